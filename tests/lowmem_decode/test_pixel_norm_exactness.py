"""The low-memory decode of VAEs with norms per pixel gives the clip diffusers gives, however it is cut."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.last_bits import psnr_db, rounding_db
from tests.support.pixel_norm_vaes import PIXEL_NORM_FAMILIES, latents_of, pixel_norm_family, timestep_of
from worker import lowmem_decode
from worker.lowmem_decode.pixel_norm import clip_decode, kernels, memory

#: What issue and docs promise in float32.
TOLERANCE = 1e-4
#: What they promise in bfloat16.
PSNR_DB = 55.0
#: Families whose frames depend on none behind them.
CAUSAL = sorted(set(PIXEL_NORM_FAMILIES) - {"ltx", "ltx095", "ltx2"})


@functools.cache
def cached(name: str) -> Any:
    return pixel_norm_family(name)


def plain(vae: Any, z: torch.Tensor, **keywords: Any) -> torch.Tensor:
    with torch.inference_mode():
        decoded: torch.Tensor = vae.decode(z, **keywords).sample
    return decoded


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent frames go through one after the other, whatever takes less."""
    force_groups(monkeypatch, together=False)


@pytest.fixture
def all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All frames go through together."""
    force_groups(monkeypatch, together=True)


def force_groups(monkeypatch: pytest.MonkeyPatch, *, together: bool) -> None:
    def arranged(program: Any, shape: Any, *, strip_rows: int | None) -> memory.Arrangement:
        return memory._with_groups_of(program, shape, shape[0] if together else 1, strip_rows)

    monkeypatch.setattr(clip_decode, "arrange", arranged)


def assert_equal_to_diffusers(name: str, frames: int, height: int, width: int, **options: Any) -> None:
    vae = cached(name)
    z = latents_of(vae, frames, height, width)
    expected = plain(vae, z, **timestep_of(vae))
    got = lowmem_decode.decode(vae, z, **timestep_of(vae), **options)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", PIXEL_NORM_FAMILIES)
def test_every_family_decodes_pictures_and_clips_as_diffusers_does(name: str) -> None:
    assert_equal_to_diffusers(name, 1, 4, 3)
    assert_equal_to_diffusers(name, 3, 2, 3, strip_rows=3)


@pytest.mark.parametrize("name", PIXEL_NORM_FAMILIES)
def test_weights_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three output channels at a time, the last part shorter."""
    monkeypatch.setattr(kernels, "_PART_BYTES", 1)
    monkeypatch.setattr(kernels, "_PART_CHANNELS", 3)
    assert_equal_to_diffusers(name, 1, 4, 3)
    assert_equal_to_diffusers(name, 3, 2, 3, strip_rows=3)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("frames", [2, 4])
@pytest.mark.parametrize("name", CAUSAL)
def test_frames_one_by_one(name: str, frames: int) -> None:
    assert_equal_to_diffusers(name, frames, 2, 3, strip_rows=2)


@pytest.mark.usefixtures("all_at_once")
@pytest.mark.parametrize("frames", [2, 4])
@pytest.mark.parametrize("name", CAUSAL)
def test_frames_all_at_once(name: str, frames: int) -> None:
    assert_equal_to_diffusers(name, frames, 2, 3, strip_rows=2)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(PIXEL_NORM_FAMILIES)),
    frames=st.integers(1, 3),
    height=st.integers(2, 4),
    width=st.integers(2, 4),
    strip_rows=st.one_of(st.none(), st.integers(1, 20)),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_any_strips(
    name: str, frames: int, height: int, width: int, strip_rows: int | None, seed: int
) -> None:
    vae = cached(name)
    z = latents_of(vae, frames, height, width, seed=seed)
    got = lowmem_decode.decode(vae, z, strip_rows=strip_rows, **timestep_of(vae))
    torch.testing.assert_close(got, plain(vae, z, **timestep_of(vae)), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [name for name in PIXEL_NORM_FAMILIES if not name.startswith("ltx2")])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (4, 1)])
def test_latents_of_one_row_or_column(name: str, height: int, width: int) -> None:
    assert_equal_to_diffusers(name, 2, height, width)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video15", "ltx2"])
def test_strips_leave_no_seam(name: str) -> None:
    """What differs from the plain decode differs no more at the borders of strips than between them."""
    vae = cached(name)
    z = latents_of(vae, 2, 6, 3)
    rows = 8
    difference = (lowmem_decode.decode(vae, z, strip_rows=rows) - plain(vae, z)).abs().mean((0, 1, 2, 4))
    at_borders = torch.zeros(len(difference), dtype=torch.bool)
    for border in range(rows, len(difference), rows):
        at_borders[border - 2 : border + 2] = True
    assert difference[at_borders].mean() <= 1.5 * difference[~at_borders].mean() + 1e-7


@pytest.mark.parametrize("name", ["wan", "ltx095"])
def test_items_of_a_batch_do_not_see_each_other(name: str) -> None:
    """Bit-equal: each is decoded by itself, at its own timestep."""
    vae = cached(name)
    z = latents_of(vae, 2, 3, 3, batch=2)
    keywords = timestep_of(vae, batch=2)
    together = lowmem_decode.decode(vae, z, **keywords)
    torch.testing.assert_close(together, plain(vae, z, **keywords), atol=TOLERANCE, rtol=0)
    for number in range(2):
        part = slice(number, number + 1)
        alone = lowmem_decode.decode(vae, z[part], **{key: value[part] for key, value in keywords.items()})
        assert torch.equal(together[part], alone)


def test_latents_and_weights_stay_as_they_were() -> None:
    for name in ("wan22", "hunyuan_video15", "ltx095"):
        vae = cached(name)
        z = latents_of(vae, 2, 3, 3)
        before = (z.clone(), {key: value.clone() for key, value in vae.state_dict().items()})
        lowmem_decode.decode(vae, z, **timestep_of(vae))
        assert torch.equal(z, before[0])
        assert all(torch.equal(value, before[1][key]) for key, value in vae.state_dict().items())


# groups of frames ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sizes"), [("wan", [1, 4, 4]), ("ltx", [1, 8, 8]), ("hunyuan_video15", [1, 4, 4])])
def test_a_clip_comes_in_what_its_latent_frames_become(name: str, sizes: list[int]) -> None:
    vae = cached(name)
    z = latents_of(vae, 3, 2, 3)
    groups = list(lowmem_decode.stream(vae, z))
    assert [group.shape[2] for group in groups] == sizes
    torch.testing.assert_close(torch.cat(groups, dim=2), plain(vae, z), atol=TOLERANCE, rtol=0)


@pytest.mark.usefixtures("one_by_one")
def test_a_group_is_there_before_the_next_is_begun() -> None:
    vae = cached("wan")
    told: list[float] = []
    groups = clip_decode.stream(vae, latents_of(vae, 4, 3, 3), on_progress=told.append)
    next(groups)
    assert told[-1] == pytest.approx(0.25)


def test_a_long_clip_goes_frame_by_frame_and_a_short_one_at_once() -> None:
    """Two frames of all rows are kept, or two rows of all frames: whichever is less."""
    program = lowmem_decode.pixel_norm.read(cached("wan"))
    assert memory.arrange(program, (2, 60, 60), strip_rows=None).frames_per_group == 2
    assert memory.arrange(program, (200, 6, 6), strip_rows=None).frames_per_group == 1


# half precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIXEL_NORM_FAMILIES)
def test_bfloat16_differs_by_rounding_only_and_is_no_further_from_float32(name: str) -> None:
    vae = pixel_norm_family(name)
    z = latents_of(vae, 2, 3, 3)
    exact = plain(vae, z, **timestep_of(vae))
    vae.to(torch.bfloat16)
    z = z.to(torch.bfloat16)
    pipeline, ours = plain(vae, z, **timestep_of(vae)), lowmem_decode.decode(vae, z, **timestep_of(vae))
    assert ours.dtype == torch.bfloat16
    if not torch.equal(ours, pipeline):
        # with random weights a few last bits change some pictures by more than that
        rounding = rounding_db(vae, lambda: plain(vae, z, **timestep_of(vae)))
        assert psnr_db(ours, pipeline) >= min(PSNR_DB, rounding)
    assert psnr_db(ours, exact) >= psnr_db(pipeline, exact) - 0.5
