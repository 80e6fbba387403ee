"""No black picture: what overflows in half precision is decoded in float32, and what stays NaN fails the job."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from broker_config.errors import NonFiniteOutput
from broker_config.latent_geometry import LatentLayout
from broker_config.settings import Settings
from producer import DecodeClient, JobFailed
from tests.support.thread_worker import ThreadWorker
from tests.support.tiny_families import catalogue, make
from worker.decode import decode_chunks
from worker.latent_layouts import Plan, Scaling
from worker.memory_ladder import MemoryModel
from worker.numerical_safety import finite_chunks, is_finite, widened


def overflowing(vae: Any) -> Any:
    """A VAE whose first convolution exceeds float16 on latents of some size, before a norm brings it back."""
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2_000)
    return vae


@pytest.fixture
def vae() -> Any:
    return overflowing(make("sd", catalogue()["sd"]))


def plan_for(frames: int = 1) -> Plan:
    return Plan(
        layout=LatentLayout.UNPACKED if frames == 1 else LatentLayout.VIDEO_2D,
        scaling=Scaling(scaling_factor=0.18215, shift_factor=None),
        batch=1,
        num_frames=frames,
        height=64,
        width=64,
        spatial=8,
        is_video=frames > 1,
    )


def latents(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * scale


def test_a_decode_that_overflows_in_float16_is_what_float32_makes_of_the_same_weights(vae: Any) -> None:
    half = copy.deepcopy(vae).half()
    wide = copy.deepcopy(half).float()
    large = latents(20.0).half()
    narrow = half.decode(large / 0.18215, return_dict=False)[0]
    assert not bool(torch.isfinite(narrow).all()), "or there is nothing to test"
    told: list[int] = []
    (made,) = finite_chunks(half, large, plan_for(), on_upcast=told.append)
    assert told == [0]
    expected = wide.decode(large.float() / 0.18215, return_dict=False)[0]
    assert made.dtype == torch.float32
    assert torch.equal(made, expected)


def test_what_is_finite_stays_in_half_precision(vae: Any) -> None:
    half = vae.half()
    small = latents(0.01).half()
    told: list[int] = []
    (made,) = finite_chunks(half, small, plan_for(), on_upcast=told.append)
    assert told == []
    assert made.dtype == torch.float16


def test_the_weights_are_the_same_bits_afterwards_also_when_the_caller_stops_early(vae: Any) -> None:
    half = vae.half()
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    chunks = finite_chunks(half, latents(20.0).half(), plan_for())
    assert next(chunks).dtype == torch.float32
    chunks.close()
    after = half.state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_parts_that_were_float32_before_stay_so(vae: Any) -> None:
    half = vae.half()
    half.decoder.conv_out.float()
    with widened(half):
        assert {item.dtype for item in half.parameters()} == {torch.float32}
    assert half.decoder.conv_out.weight.dtype == torch.float32
    assert half.decoder.conv_in.weight.dtype == torch.float16


class Cramped:
    """Weights whose narrow copy finds no memory so many times."""

    def __init__(self, refusals: int) -> None:
        self.dtype = torch.float16
        self.data = self
        self._refusals = refusals

    def float(self) -> Cramped:
        self.dtype = torch.float32
        return self

    def to(self, dtype: torch.dtype) -> Cramped:
        if self._refusals:
            self._refusals -= 1
            raise RuntimeError("out of memory")
        self.dtype = dtype
        return self


def test_weights_for_which_there_is_no_room_are_narrowed_after_the_others() -> None:
    weights = [Cramped(1), Cramped(0), Cramped(2), Cramped(0)]
    with widened(SimpleNamespace(parameters=lambda: weights, buffers=list)):
        assert {each.dtype for each in weights} == {torch.float32}
    assert {each.dtype for each in weights} == {torch.float16}
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        widened(SimpleNamespace(parameters=lambda: [Cramped(9), Cramped(0)], buffers=list)),
    ):
        pass


def test_one_number_of_a_clip_that_is_not_finite_is_found() -> None:
    clip = torch.zeros(1, 3, 9, 640, 640)  # more than one part
    assert is_finite(clip)
    clip[0, 1, 8, 639, 639] = float("nan")
    assert not is_finite(clip)
    assert is_finite(clip[:, :, :8])


def test_a_stream_goes_on_in_float32_from_the_piece_that_overflowed(vae: Any) -> None:
    half = vae.half()
    clip = torch.stack([latents(0.01)] * 20 + [latents(20.0)] * 2, dim=2).half()  # 1, 4, 22, 8, 8
    told: list[int] = []
    pieces = list(finite_chunks(half, clip, plan_for(frames=22), on_upcast=told.append))
    assert told == [1], "frames 17 to 22 are the second piece"
    assert [piece.dtype for piece in pieces] == [torch.float16, torch.float32]
    assert [piece.shape[0] for piece in pieces] == [16, 6]
    assert all(bool(torch.isfinite(piece).all()) for piece in pieces)


def test_pieces_that_are_not_wanted_again_are_not_decoded_again(vae: Any) -> None:
    clip = torch.randn(1, 4, 40, 8, 8)
    every = list(decode_chunks(vae, clip, plan_for(frames=40)))
    rest = list(decode_chunks(vae, clip, plan_for(frames=40), first=2))
    assert len(every) == 3
    assert len(rest) == 1
    assert torch.equal(rest[0], every[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_stays_nan_is_refused_and_says_in_which_dtypes(vae: Any, dtype: torch.dtype) -> None:
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(torch.nan)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NonFiniteOutput, match="NaN or Inf") as refusal:
        list(finite_chunks(vae.to(dtype), latents(0.01), plan_for()))
    assert (refusal.value.code, refusal.value.retryable) == ("output_not_finite", False)
    assert name in refusal.value.message
    assert "float32" in refusal.value.message


# Through the queue ------------------------------------------------------------------------------------------


def overflow(running: ThreadWorker) -> None:
    overflowing(running.worker.pool.get("sd").module)


def large_latents() -> np.ndarray[Any, np.dtype[np.float32]]:
    array: np.ndarray[Any, np.dtype[np.float32]] = latents(20.0).numpy()
    return array


@pytest.mark.parametrize("output", ["png", "tensor"])
def test_the_result_says_that_it_was_decoded_in_float32(client: DecodeClient, settings: Settings, output: str) -> None:
    running = ThreadWorker(settings, dtype="float16")
    overflow(running)
    with running:
        job = client.submit(large_latents(), vae="sd", output=output)
        assert job.wait(60).status == "succeeded"
    facts = job.result().decoded_by
    assert (facts["dtype"], facts["upcast"], facts["upcast_from"]) == ("float16", "float32", 0)
    if output == "png":
        assert len(np.unique(np.asarray(job.image()))) > 32, "a picture, not a black square"


def test_only_plain_decodes_teach_what_a_plain_decode_takes(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[tuple[str, torch.dtype]] = []
    monkeypatch.setattr(MemoryModel, "learn", lambda self, vae, **facts: learned.append((vae, facts["dtype"])))
    running = ThreadWorker(settings, dtype="float16")
    overflow(running)
    with running:
        jobs = [
            client.submit(large_latents(), vae="sd", mode="exact"),  # decoded again in float32
            client.encode(np.zeros((64, 64, 3), np.uint8), vae="sd"),
            client.submit(latents(0.01).numpy(), vae="sd", mode="exact"),
        ]
        assert [job.wait(60).status for job in jobs] == ["succeeded"] * 3
    assert learned == [("sd", torch.float16)]


def test_a_job_that_stays_nan_fails_with_its_own_code_and_sends_no_picture(
    client: DecodeClient, settings: Settings
) -> None:
    running = ThreadWorker(settings)
    with torch.no_grad():
        running.worker.pool.get("sd").module.decoder.conv_out.bias.fill_(torch.nan)
    with running:
        job = client.submit(large_latents(), vae="sd")
        snapshot = job.wait(60)
    assert snapshot.status == "failed"
    assert snapshot.error_count == 1, "another attempt would make the same numbers"
    assert snapshot.errors[-1]["code"] == "output_not_finite"
    with pytest.raises(JobFailed) as refusal:
        job.image()
    assert refusal.value.error_code == "output_not_finite"


def test_a_clip_that_overflows_late_fails_nothing_and_has_every_frame(client: DecodeClient, settings: Settings) -> None:
    running = ThreadWorker(settings, dtype="float16")
    overflow(running)
    clip = np.concatenate([latents(0.01).numpy()[:, :, None]] * 18 + [latents(20.0).numpy()[:, :, None]] * 2, axis=2)
    with running:
        job = client.submit(clip, vae="sd", layout="video_2d", output="uint8")
        assert job.wait(60).status == "succeeded"
    assert job.array().shape == (1, 20, 64, 64, 3)
    assert job.result().decoded_by["upcast_from"] == 1
