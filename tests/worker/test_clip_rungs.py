"""A clip that does not fit is decoded by the low-memory decoder: the same clip, whose frames still come in groups."""

from __future__ import annotations

import gc
import queue
import threading
from typing import Any

import pytest
import torch

from broker_config.claims import Claim
from broker_config.latent_geometry import LatentLayout
from broker_config.messages import BlobRef, DecodeRequest, Output
from broker_config.vae_catalog import VaeEntry
from tests.support.clip_vaes import clip_family
from worker import decode_ways
from worker.batch_decode import BatchDecoder
from worker.device_stage import DeviceStage
from worker.frame_stream import can_stream, frames_at_once, stream_frames
from worker.lowmem_decode import LowMemoryVae
from worker.memory_ladder import Rung
from worker.next_claim import NextClaim
from worker.preview import Previewer
from worker.stages import ChunkStream, Failure, Stopwatch, Work
from worker.vae_pool import LoadedVae

#: Class, frames of a latent frame, and of the clip for four latent frames.
CLIPS = {
    "hunyuan_video": ("AutoencoderKLHunyuanVideo", 4, 13),
    "mochi": ("AutoencoderKLMochi", 6, 19),
    "cogvideox": ("AutoencoderKLCogVideoX", 4, 16),
}


class NoReporter:
    """Notes what failed."""

    def __init__(self) -> None:
        self.failed: list[Failure] = []

    def skip(self, claim: Claim) -> bool:
        return False

    def fail(self, claim: Claim, failure: Failure, *, stage: str) -> None:
        self.failed.append(failure)


class NoLeases:
    """Nobody to tell."""

    def enter(self, *_: object, **__: object) -> None:
        return

    def expect(self, *_: object, **__: object) -> None:
        return

    def tell(self, *_: object) -> None:
        return


def decoded(name: str, latents: torch.Tensor, *, output: Output) -> tuple[Work, list[torch.Tensor], list[Failure]]:
    """A job brought through the device, and what it became."""
    kind, temporal, frames = CLIPS[name]
    vae = clip_family(name)
    entry = VaeEntry(
        name="t",
        title="t",
        weights="/t",
        vae_class=kind,
        channels=4,
        spatial=8,
        temporal=temporal,
        layouts=(LatentLayout.VIDEO,),
    )
    loaded = LoadedVae(
        entry=entry, module=vae, dtype=torch.float32, device=torch.device("cpu"), weights={}, size_bytes=0
    )
    request = DecodeRequest(
        job_id="j",
        vae="t",
        layout="video",
        latents=BlobRef(store="redis", name="n", sha256="0", size_bytes=1),
        shape=tuple(latents.shape),
        dtype="float32",
        height=latents.shape[3] * 8,
        width=latents.shape[4] * 8,
        batch=1,
        num_frames=frames,
        fps=8.0,
        state="denormalised",
        output=output,
        timeout_s=60.0,
    )
    work = Work(claim=Claim("j", "e", b"", b"", 1, 0), request=request, latents=latents)
    reporter = NoReporter()
    chunks: list[torch.Tensor] = []
    threads: list[threading.Thread] = []

    def take(work: Work, stream: ChunkStream) -> None:
        thread = threading.Thread(target=lambda: chunks.extend(chunk.get() for chunk in stream), name="taker")
        thread.start()
        threads.append(thread)

    parts: dict[str, Any] = {
        "decoder": BatchDecoder(hand_on=take, on_progress=lambda *_: None, default_mode="exact"),
        "reporter": reporter,
        "leases": NoLeases(),
        "previewer": Previewer(None, None, served=tuple),  # type: ignore[arg-type]
    }
    stage = DeviceStage(
        queue.Queue(), next_claim=NextClaim(), evict_others=lambda name: 0, stopwatch=Stopwatch(), **parts
    )
    stage._bring_through(loaded, [work])
    for thread in threads:
        thread.join(30)
    return work, chunks, reporter.failed


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_that_does_not_fit_goes_to_the_low_memory_rung(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(1, 4, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = clip_family(name).decode(latents, return_dict=False)[0]
    monkeypatch.setattr(decode_ways, "free_bytes", lambda device: 1)  # by the estimate not even one clip fits
    work, chunks, failed = decoded(name, latents, output=Output.TENSOR)
    assert not failed
    assert work.decoded_by["rung"] == Rung.LOW_MEMORY
    torch.testing.assert_close(torch.cat(chunks), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "groups"), [("hunyuan_video", 1), ("mochi", 4), ("cogvideox", 2)])
def test_frames_go_out_while_later_ones_are_decoded(name: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(1, 4, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(decode_ways, "free_bytes", lambda device: 1)
    work, chunks, failed = decoded(name, latents, output=Output.MP4)
    monkeypatch.undo()
    plain, whole, _ = decoded(name, latents, output=Output.MP4)
    assert not failed
    assert (work.decoded_by["rung"], plain.decoded_by["rung"]) == (Rung.LOW_MEMORY, Rung.PLAIN)
    assert len(chunks) == groups
    assert torch.cat(chunks).shape == (CLIPS[name][2], 16, 24, 3)
    assert (torch.cat(chunks).int() - torch.cat(whole).int()).abs().max() <= 1


def test_only_frames_that_are_activations_at_once_are_counted() -> None:
    """A tile of HunyuanVideo has 16 frames and one to drop; a group of CogVideoX 8, and the rest of a clip."""
    assert frames_at_once(clip_family("hunyuan_video"), 129) == 17
    assert frames_at_once(clip_family("cogvideox"), 49) == 9
    assert frames_at_once(clip_family("cogvideox"), 8) == 8
    assert frames_at_once(clip_family("mochi"), 163) == 163


def live_bytes() -> int:
    """Bytes of all tensors that Python holds."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):  # isinstance would wake deprecated proxies
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(("name", "frames"), [("hunyuan_video", 16), ("mochi", 6), ("cogvideox", 12)])
def test_what_a_stream_holds_does_not_grow_with_the_clip(name: str, frames: int) -> None:
    vae = LowMemoryVae(clip_family(name))
    assert can_stream(vae)
    latents = torch.randn(1, 4, frames, 2, 2)
    held = []
    with torch.inference_mode():
        for group in stream_frames(vae, latents):
            del group
            held.append(live_bytes())
    assert len(held) >= 5
    assert len(set(held[1:-2])) == 1
    assert held[-1] <= held[1]
