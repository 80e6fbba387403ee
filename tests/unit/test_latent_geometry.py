"""What latents decode to is arithmetic: sizes by hand, from the compression of each VAE and its pipeline's rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_config.errors import InvalidChannels, InvalidOption, InvalidRank, InvalidSize
from broker_config.latent_geometry import LAYOUTS, FrameRule, Geometry, LatentFacts, LatentLayout, measure

#: A machine that does much else must not fail a test.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

UNPACKED, PACKED = LatentLayout.UNPACKED, LatentLayout.PACKED
VIDEO, VIDEO_2D = LatentLayout.VIDEO, LatentLayout.VIDEO_2D
FIRST = (UNPACKED, PACKED, VIDEO, VIDEO_2D)


@dataclass(frozen=True)
class Vae:
    """Channels, pixels per latent pixel, frames per latent frame."""

    channels: int
    spatial: int
    temporal: int = 1
    frames: FrameRule = FrameRule.FIRST_ALONE
    patch_size: int = 2
    resizes: bool = False


SD, FLUX, HUNYUAN = Vae(4, 8), Vae(16, 8), Vae(16, 8, 4)
#: DC-AE and Mochi: nothing may be fixed to 8 and 4.
WIDE, LONG = Vae(32, 32), Vae(12, 8, 6)


@pytest.mark.parametrize(
    ("layout", "shape", "vae", "asked", "expected"),
    [
        (UNPACKED, (1, 4, 64, 64), SD, {}, (1, 1, 512, 512)),
        (UNPACKED, (3, 4, 96, 128), SD, {}, (3, 1, 768, 1024)),
        (UNPACKED, (1, 4, 1, 1), SD, {}, (1, 1, 8, 8)),
        (UNPACKED, (1, 32, 20, 32), WIDE, {}, (1, 1, 640, 1024)),
        (UNPACKED, (1, 4, 96, 128), SD, {"height": 768, "width": 1024, "num_frames": 1}, (1, 1, 768, 1024)),
        (PACKED, (1, 4096, 64), FLUX, {"height": 1024, "width": 1024}, (1, 1, 1024, 1024)),
        (PACKED, (2, 3072, 64), FLUX, {"height": 768, "width": 1024}, (2, 1, 768, 1024)),
        (PACKED, (2, 3072, 64), FLUX, {"height": 1024, "width": 768}, (2, 1, 1024, 768)),
        (PACKED, (1, 1, 64), FLUX, {"height": 16, "width": 16}, (1, 1, 16, 16)),
        # FluxPipeline rounds down to multiples of 16: 1080 → 1072, 1928 → 1920.
        (PACKED, (1, 67 * 120, 64), FLUX, {"height": 1080, "width": 1928}, (1, 1, 1072, 1920)),
        (PACKED, (1, 6, 128), WIDE, {"height": 128, "width": 192}, (1, 1, 128, 192)),
        (VIDEO, (1, 16, 33, 90, 160), HUNYUAN, {}, (1, 129, 720, 1280)),
        (VIDEO, (2, 16, 1, 4, 6), HUNYUAN, {}, (2, 1, 32, 48)),
        (VIDEO, (1, 16, 2, 4, 6), HUNYUAN, {"num_frames": 5}, (1, 5, 32, 48)),
        (VIDEO, (1, 12, 28, 60, 106), LONG, {"height": 480, "width": 848, "num_frames": 163}, (1, 163, 480, 848)),
        (VIDEO_2D, (2, 4, 16, 64, 64), SD, {}, (2, 16, 512, 512)),
        (VIDEO_2D, (1, 4, 1, 64, 64), SD, {"num_frames": 1}, (1, 1, 512, 512)),
    ],
)
def test_sizes_by_hand(
    layout: LatentLayout, shape: tuple[int, ...], vae: Vae, asked: dict[str, Any], expected: tuple[int, ...]
) -> None:
    batch, num_frames, height, width = expected
    assert measure(layout, shape, vae=vae, **asked) == Geometry(
        batch=batch,
        num_frames=num_frames,
        height=height,
        width=width,
        is_video=layout in (VIDEO, VIDEO_2D),
    )


sizes = st.integers(1, 10**6)


@unhurried
@given(batch=sizes, rows=sizes, columns=sizes, spatial=sizes)
def test_a_picture_is_its_latents_times_the_compression(batch: int, rows: int, columns: int, spatial: int) -> None:
    made = measure(UNPACKED, (batch, 4, rows, columns), vae=Vae(4, spatial))
    assert (made.batch, made.num_frames, made.height, made.width) == (batch, 1, rows * spatial, columns * spatial)


@unhurried
@given(rows=sizes, columns=sizes, spare_height=st.integers(0, 15), spare_width=st.integers(0, 15))
def test_packed_latents_are_what_is_left_of_the_size_after_rounding_down(
    rows: int, columns: int, spare_height: int, spare_width: int
) -> None:
    asked: dict[str, Any] = {"height": rows * 16 + spare_height, "width": columns * 16 + spare_width}
    made = measure(PACKED, (1, rows * columns, 64), vae=FLUX, **asked)
    assert (made.height, made.width) == (rows * 16, columns * 16)
    with pytest.raises(InvalidSize):
        measure(PACKED, (1, rows * columns + 1, 64), vae=FLUX, **asked)


@unhurried
@given(frames=sizes, temporal=sizes)
def test_the_first_latent_frame_is_one_frame_and_each_other_as_many_as_the_compression(
    frames: int, temporal: int
) -> None:
    made = measure(VIDEO, (1, 16, frames, 1, 1), vae=Vae(16, 8, temporal))
    assert made.num_frames == 1 + (frames - 1) * temporal


def expect_refusal(kind: Any, code: str, field: str, layout: LatentLayout, shape: Any, vae: Vae, **asked: Any) -> str:
    with pytest.raises(kind) as refusal:
        measure(layout, shape, vae=vae, **asked)
    assert type(refusal.value) is kind
    assert (refusal.value.code, refusal.value.field) == (code, field)
    return str(refusal.value.message)


@pytest.mark.parametrize("layout", list(LatentLayout))
@pytest.mark.parametrize("rank", range(9))
def test_only_the_layouts_own_rank_is_taken(layout: LatentLayout, rank: int) -> None:
    own = LAYOUTS[layout].rank
    assert own == {UNPACKED: 4, PACKED: 3, VIDEO: 5, VIDEO_2D: 5}.get(layout, own)
    shape = (1, 4, 8, 8, 8, 8, 8, 8)[:rank]
    if rank != own:
        message = expect_refusal(InvalidRank, "latents_rank", "latents", layout, shape, SD)
        assert f"{rank} dimensions, layout {layout} takes (batch, " in message


@pytest.mark.parametrize("layout", FIRST)
def test_an_empty_dimension_is_refused_wherever_it_is(layout: LatentLayout) -> None:
    shape = {UNPACKED: (1, 4, 8, 8), PACKED: (1, 24, 16), VIDEO: (1, 4, 2, 8, 8), VIDEO_2D: (1, 4, 2, 8, 8)}[layout]
    for place in range(len(shape)):
        for size in (0, -1):
            broken = (*shape[:place], size, *shape[place + 1 :])
            message = expect_refusal(InvalidSize, "latents_size", "latents", layout, broken, SD, height=64, width=96)
            assert "empty dimension" in message


@pytest.mark.parametrize(
    ("layout", "shape", "found", "expected"),
    [
        (UNPACKED, (1, 16, 8, 8), 16, 4),
        (UNPACKED, (1, 8, 8, 4), 8, 4),
        (PACKED, (1, 24, 4), 4, 16),
        (PACKED, (1, 24, 64), 64, 16),
        (VIDEO, (1, 2, 4, 8, 8), 2, 4),
        (VIDEO_2D, (1, 2, 4, 8, 8), 2, 4),
    ],
)
def test_channels_of_another_vae_are_refused(
    layout: LatentLayout, shape: tuple[int, ...], found: int, expected: int
) -> None:
    message = expect_refusal(InvalidChannels, "latents_channels", "latents", layout, shape, SD, height=64, width=96)
    assert f"{found} channels, this VAE takes {expected}" in message


@pytest.mark.parametrize(
    ("layout", "shape", "asked", "field"),
    [
        (UNPACKED, (1, 4, 8, 12), {"height": 65}, "height"),
        (UNPACKED, (1, 4, 8, 12), {"height": 96, "width": 64}, "height"),
        (UNPACKED, (1, 4, 8, 12), {"height": 64, "width": 64}, "width"),
        (UNPACKED, (1, 4, 8, 12), {"num_frames": 2}, "num_frames"),
        (PACKED, (1, 24, 16), {}, "height"),
        (PACKED, (1, 24, 16), {"width": 96}, "height"),
        (PACKED, (1, 24, 16), {"height": 64}, "width"),
        (PACKED, (1, 24, 16), {"height": 64, "width": 64}, "height"),
        (PACKED, (1, 24, 16), {"height": 15, "width": 96}, "height"),
        (PACKED, (1, 24, 16), {"height": 64, "width": 96, "num_frames": 2}, "num_frames"),
        (VIDEO_2D, (1, 4, 3, 8, 12), {"num_frames": 9}, "num_frames"),
        (VIDEO_2D, (1, 4, 3, 8, 12), {"width": 64}, "width"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_by_its_name(
    layout: LatentLayout, shape: tuple[int, ...], asked: dict[str, Any], field: str
) -> None:
    expect_refusal(InvalidSize, "latents_size", field, layout, shape, SD, **asked)


def test_huge_shapes_are_only_numbers() -> None:
    made = measure(UNPACKED, (1, 4, 2**40, 2**40), vae=SD)
    assert made.height * made.width == 2**86


# The layouts of single families ----------------------------------------------------------------------------

L = LatentLayout
WAN, QWEN21, REFINER = Vae(16, 8, 4), Vae(64, 16, 8, patch_size=1), Vae(32, 16, 4)
COGVIDEOX = Vae(16, 8, 4, FrameRule.PAIRS)
ALLEGRO, MINIMAX = Vae(4, 8, 4, FrameRule.EVEN), Vae(24, 16, 4, FrameRule.CLIPS)
FLUX2, LTX, SANA = Vae(32, 8), Vae(128, 32, 8, patch_size=1), Vae(32, 32, resizes=True)
SIZE = {"height": 96, "width": 160}


@pytest.mark.parametrize(
    ("layout", "shape", "vae", "asked", "facts", "expected"),
    [
        (L.FRAMES_2D, (2, 14, 4, 72, 128), SD, {}, {}, (2, 14, 576, 1024)),
        (L.CHANNELS_LAST, (1, 31, 64, 96, 16), WAN, {}, {}, (1, 121, 512, 768)),
        (L.CHANNELS_LAST_IMAGE, (2, 1, 12, 20, 16), FLUX, {}, {}, (2, 1, 96, 160)),
        (L.FRAME, (2, 16, 1, 12, 20), WAN, {}, {}, (2, 1, 96, 160)),
        (L.UNPACKED_FRAME, (2, 16, 12, 20), WAN, {}, {}, (2, 1, 96, 160)),
        (L.PACKED_FRAME, (2, 60, 64), WAN, SIZE, {}, (2, 1, 96, 160)),
        (L.PACKED_FRAME, (2, 240, 16), WAN, SIZE, {"patch_size": 1}, (2, 1, 96, 160)),
        (L.PACKED_FRAME, (1, 60, 64), QWEN21, SIZE, {}, (1, 1, 96, 160)),
        # pipeline_qwenimage21.py rounds to an even number of tokens: 112 px are 7 of them, of which 6 count
        (L.PACKED_FRAME, (1, 60, 64), QWEN21, {"height": 112, "width": 160}, {}, (1, 1, 96, 160)),
        (L.LAYERS, (2, 4 * 60, 64), WAN, SIZE, {"layers": 3}, (6, 1, 96, 160)),
        (L.PACKED_VIDEO, (1, 3 * 15, 128), LTX, {"height": 96, "width": 160, "num_frames": 17}, {}, (1, 17, 96, 160)),
        # pipeline_ltx.py: 20 frames make 3 latent frames, and those 17
        (L.PACKED_VIDEO, (1, 3 * 15, 128), LTX, {"height": 96, "width": 160, "num_frames": 20}, {}, (1, 17, 96, 160)),
        (L.PATCHED, (2, 128, 6, 10), FLUX2, {}, {}, (2, 1, 96, 160)),
        (L.PACKED_PATCHED, (2, 60, 128), FLUX2, SIZE, {}, (2, 1, 96, 160)),
        (L.PACKED_PATCHED_LAST, (2, 60, 128), FLUX2, SIZE, {}, (2, 1, 96, 160)),
        (L.FRAME_PAIRS, (2, 64, 1, 6, 10), REFINER, {}, {}, (2, 1, 96, 160)),
        (L.ITEMS, (2, 3, 16, 1, 12, 20), WAN, {}, {}, (2, 1, 96, 160)),
        (L.ITEM_PATCHES, (2, 99, 16, 1, 2, 2), WAN, SIZE, {}, (2, 1, 96, 160)),
        (L.VIDEO_CHUNKS, (1, 16, 18, 12, 20), WAN, {}, {"frames_per_call": 9}, (1, 65, 96, 160)),
        (
            L.VIDEO_CHUNKS,
            (1, 16, 19, 12, 20),
            WAN,
            {},
            {"frames_per_call": 9, "additional_frames": 1},
            (1, 65, 96, 160),
        ),
        # pipeline_ltx2_dfr.py: 9 frames are padded to a segment of 24, and their 2 latent frames are kept of 4
        (L.VIDEO_CANVAS, (2, 128, 4, 3, 5), LTX, {"num_frames": 9}, {}, (2, 9, 96, 160)),
        (L.VIDEO_CANVAS, (2, 128, 4, 3, 5), LTX, {"num_frames": 25}, {}, (2, 25, 96, 160)),
        (L.VIDEO_SECTIONS, (1, 16, 19, 12, 20), WAN, {}, {"frames_per_call": 9}, (1, 73, 96, 160)),
        (L.VIDEO_BLENDED, (1, 128, 3, 16, 22), LTX, {}, {}, (1, 17, 512, 704)),
        (L.VIDEO_BLENDED, (1, 128, 3, 6, 8), LTX, {}, {"blended_tiles": "2x3+1"}, (1, 17, 192, 256)),
        (L.VIDEO, (1, 16, 4, 12, 20), WAN, {}, {"additional_frames": 1}, (1, 9, 96, 160)),
        (L.FRAMES_FIRST, (1, 13, 16, 12, 20), COGVIDEOX, {}, {}, (1, 49, 96, 160)),
        (L.FRAMES_FIRST, (1, 14, 16, 12, 20), COGVIDEOX, {}, {}, (1, 56, 96, 160)),
        (L.FRAMES_FIRST, (1, 14, 16, 12, 20), COGVIDEOX, {}, {"additional_frames": 1}, (1, 49, 96, 160)),
        (L.VIDEO, (1, 4, 22, 90, 160), ALLEGRO, {}, {}, (1, 88, 720, 1280)),
        (L.VIDEO, (1, 4, 22, 90, 160), ALLEGRO, {"num_frames": 85}, {}, (1, 85, 720, 1280)),
        (L.VIDEO, (1, 24, 5, 6, 10), MINIMAX, {}, {}, (1, 17, 96, 160)),
        (L.VIDEO, (1, 24, 7, 6, 10), MINIMAX, {}, {}, (1, 22, 96, 160)),
        (L.UNPACKED, (1, 32, 32, 32), SANA, {}, {}, (1, 1, 1024, 1024)),
        (L.UNPACKED, (1, 32, 32, 32), SANA, {"height": 1000, "width": 900}, {}, (1, 1, 1000, 900)),
    ],
)
def test_sizes_of_single_families_by_hand(
    layout: LatentLayout,
    shape: tuple[int, ...],
    vae: Vae,
    asked: dict[str, Any],
    facts: dict[str, Any],
    expected: tuple[int, ...],
) -> None:
    made = measure(layout, shape, vae=vae, facts=LatentFacts(**facts), **asked)
    assert (made.batch, made.num_frames, made.height, made.width) == expected
    assert made.is_video == LAYOUTS[layout].is_video


@pytest.mark.parametrize(
    ("layout", "shape", "vae", "asked", "facts", "kind", "field"),
    [
        (L.FRAME, (1, 16, 2, 12, 20), WAN, {}, {}, InvalidSize, "latents"),
        (L.LAYERS, (1, 120, 64), WAN, SIZE, {}, InvalidSize, "layers"),
        (L.LAYERS, (1, 120, 64), WAN, SIZE, {"layers": 2}, InvalidSize, "height"),
        (L.PACKED_VIDEO, (1, 45, 128), LTX, {"height": 96, "width": 160}, {}, InvalidSize, "num_frames"),
        (L.PACKED_VIDEO, (1, 45, 128), LTX, {"height": 96, "width": 128, "num_frames": 17}, {}, InvalidSize, "height"),
        (L.PATCHED, (2, 32, 6, 10), FLUX2, {}, {}, InvalidChannels, "latents"),
        (L.FRAME_PAIRS, (2, 32, 1, 6, 10), REFINER, {}, {}, InvalidChannels, "latents"),
        (L.ITEM_PATCHES, (2, 59, 16, 1, 2, 2), WAN, SIZE, {}, InvalidSize, "height"),
        (L.ITEM_PATCHES, (2, 60, 16, 1, 2, 3), WAN, SIZE, {}, InvalidSize, "height"),
        (L.VIDEO_CHUNKS, (1, 16, 18, 12, 20), WAN, {}, {}, InvalidSize, "frames_per_call"),
        (L.VIDEO_SECTIONS, (1, 16, 18, 12, 20), WAN, {}, {"frames_per_call": 9}, InvalidSize, "frames_per_call"),
        (L.VIDEO_CHUNKS, (1, 16, 18, 12, 20), WAN, {}, {"frames_per_call": 4}, InvalidSize, "frames_per_call"),
        (
            L.VIDEO_CHUNKS,
            (1, 16, 4, 12, 20),
            WAN,
            {},
            {"frames_per_call": 2, "additional_frames": 4},
            InvalidSize,
            "additional_frames",
        ),
        (L.VIDEO_CANVAS, (1, 128, 4, 3, 5), LTX, {}, {}, InvalidSize, "num_frames"),
        (L.VIDEO_CANVAS, (1, 128, 4, 3, 5), LTX, {"num_frames": 33}, {}, InvalidSize, "num_frames"),
        (L.VIDEO_CANVAS, (1, 128, 4, 3, 5), LTX, {"num_frames": 10}, {}, InvalidSize, "num_frames"),
        (L.VIDEO, (1, 16, 4, 12, 20), WAN, {}, {"additional_frames": 4}, InvalidSize, "additional_frames"),
        (L.VIDEO_BLENDED, (1, 128, 3, 2, 22), LTX, {}, {}, InvalidSize, "blended_tiles"),
        (L.VIDEO_BLENDED, (1, 128, 3, 16, 3), LTX, {}, {"blended_tiles": "4x4+0"}, InvalidSize, "blended_tiles"),
        (L.VIDEO_BLENDED, (1, 128, 3, 90, 90), LTX, {}, {"blended_tiles": "40x40+60"}, InvalidSize, "blended_tiles"),
        (L.VIDEO, (1, 128, 3, 16, 22), LTX, {}, {"blended_tiles": "4x4+3"}, InvalidOption, "blended_tiles"),
        (L.VIDEO, (1, 16, 4, 12, 20), WAN, {}, {"patch_size": 2}, InvalidOption, "patch_size"),
        (L.UNPACKED, (1, 4, 12, 20), SD, {}, {"layers": 2}, InvalidOption, "layers"),
        (L.UNPACKED, (1, 4, 12, 20), SD, {}, {"frames_per_call": 2}, InvalidOption, "frames_per_call"),
        (L.VIDEO, (1, 4, 22, 90, 160), ALLEGRO, {"num_frames": 84}, {}, InvalidSize, "num_frames"),
        (L.VIDEO, (1, 24, 2, 6, 10), MINIMAX, {}, {}, InvalidSize, "latents"),
    ],
)
def test_latents_of_single_families_that_do_not_fit_are_refused_by_name(
    layout: LatentLayout,
    shape: tuple[int, ...],
    vae: Vae,
    asked: dict[str, Any],
    facts: dict[str, Any],
    kind: Any,
    field: str,
) -> None:
    with pytest.raises(kind) as refusal:
        measure(layout, shape, vae=vae, facts=LatentFacts(**facts), **asked)
    assert refusal.value.field == field
