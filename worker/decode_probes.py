"""Fits the planner's cost model to decodes of growing size, once for each VAE, dtype and device.

DESIGN. `CostModels.get` may be called from any thread; one fit runs at a time, under the VAE's lock, since it decodes.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from broker_config.errors import OutOfMemory
from broker_config.latent_geometry import FrameRule
from worker import lowmem_decode
from worker.decode_memory import takes_clips
from worker.decode_meter import Measured, decoder_of, measure
from worker.decode_planner import FAST_MODES, CostModel, DecodeMode, Line, Probe
from worker.fast_path import FastVae
from worker.memory_ladder import first_guess, make_room
from worker.stages import classify
from worker.vae_pool import LoadedVae

#: Latent sizes probed, (batch, side), of a VAE of clips (frames, side): small ones tell the constant, large ones the
#: slope.
_SIZES: Final = ((1, 8), (4, 8), (1, 16), (1, 32), (1, 64))
_CLIP_SIZES: Final = ((1, 8), (3, 8), (1, 16), (3, 16), (3, 32))
#: No larger probe after one that took so long: warm-up is to take seconds.
_LONG_S: Final = 1.0
#: Latent side at which memory is estimated by arithmetic for the line's second point; the first is half of it.
_ARITHMETIC_SIDE: Final = 128


def probes(
    module: Any,
    *,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    fast: FastVae | None = None,
) -> Iterator[Probe]:
    """Decodes random latents and says what each call took.

    Args:
        module: the VAE.
        channels: latent channels.
        device: where it is.
        dtype: of its weights.
        fast: its fast ways, where it has any.
    """
    modes = [DecodeMode.PLAIN]
    if fast is not None:
        modes.append(DecodeMode.FAST)
        if fast.is_compiled:
            modes.append(DecodeMode.COMPILED)
    if lowmem_decode.supports(module) is None:
        modes += [DecodeMode.LOW_MEMORY, DecodeMode.LEAN]
    clips = takes_clips(module)
    for mode in modes:
        decode = _Counted(decoder_of(module, mode, fast=fast))
        sizes = _CLIP_SIZES if clips else _SIZES
        measure(decode, torch.zeros(_shape(channels, (1, 8), clips=clips), device=device, dtype=dtype))  # warm
        for size in sizes:
            if mode is DecodeMode.COMPILED and not _compiles(fast, *size):
                continue
            took = _measured(decode, _shape(channels, size, clips=clips), device=device, dtype=dtype)
            if took is None:
                break
            # beside other threads the resident set of a CPU process is not the decode's
            peak = took.peak_bytes if device.type == "cuda" else 0
            yield Probe(mode=mode, pixels=decode.pixels, seconds=took.seconds, peak_bytes=peak)
            if took.seconds > _LONG_S:
                break


def _measured(
    decode: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype
) -> Measured | None:
    """A decode of random latents; None if there is no memory for it.

    On CUDA the second one: in the first, kernels of this size are chosen, loaded and compiled.
    """
    try:
        latents = torch.randn(shape, device=device).to(dtype)
        if device.type == "cuda":
            measure(decode, latents)
        return measure(decode, latents)
    except Exception as error:
        if not isinstance(classify(error), OutOfMemory):
            raise
    make_room(device, evict=lambda: 0)  # out here: the error held what the decode had
    return None


def why_unmeasured(vae: LoadedVae) -> str | None:
    """Why a VAE does not decode random latents of any size, told nothing else; None if it does."""
    module, entry = vae.module, vae.entry
    if module.config.get("timestep_conditioning"):
        return "it is conditioned on a timestep"
    if "num_frames" in inspect.signature(module.decode).parameters:
        return "it decodes frames together that it has to be told the number of"
    if entry.frames is FrameRule.CLIPS or entry.tiled:
        return "it does not decode latents of a few frames, rows and columns"
    return "it decodes from noise" if entry.draws_noise else None


class _Counted:
    """A decode that counts the pixels it made."""

    def __init__(self, decode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._decode = decode
        #: Of the last call, over all pictures and frames.
        self.pixels = 0

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        made = self._decode(latents)
        self.pixels = made.numel() // made.shape[1]
        return made


def _shape(channels: int, size: tuple[int, int], *, clips: bool) -> tuple[int, ...]:
    count, side = size
    return (1, channels, count, side, side) if clips else (count, channels, side, side)


def _compiles(fast: FastVae | None, batch: int, side: int) -> bool:
    return fast is not None and batch == 1 and fast.compiles(side, side)


def bytes_by_arithmetic(
    module: Any,
    *,
    channels: int,
    spatial: int,
    device: torch.device,
    dtype: torch.dtype,
    fast: FastVae | None = None,
) -> dict[DecodeMode, Line]:
    """Memory where it is known without a measurement: the low-memory modes, and on a CPU a guess for plain.

    Empty for a VAE of clips, whose memory is no line (`decode_memory`).
    """
    known: dict[DecodeMode, Line] = {}
    if takes_clips(module):
        return known
    if device.type != "cuda":
        known[DecodeMode.PLAIN] = Line(constant=0.0, slope=first_guess(module, device=device, dtype=dtype))
        if fast is not None:  # fused norms hold one activation less; a guess may be high
            line = Line(constant=0.0, slope=first_guess(module, device=device, dtype=fast.dtype))
            known |= dict.fromkeys(FAST_MODES, line)
    if lowmem_decode.supports(module) is None:
        for mode, lean in ((DecodeMode.LOW_MEMORY, False), (DecodeMode.LEAN, True)):
            shapes = [(1, channels, side, side) for side in (_ARITHMETIC_SIDE // 2, _ARITHMETIC_SIDE)]
            known[mode] = Line.fit(
                [
                    ((shape[3] * spatial) ** 2, float(lowmem_decode.working_bytes(module, shape, dtype, lean=lean)))
                    for shape in shapes
                ]
            )
    return known


def fit(
    module: Any,
    *,
    channels: int,
    spatial: int,
    device: torch.device,
    dtype: torch.dtype,
    fast: FastVae | None = None,
) -> CostModel:
    """A cost model from probes run now."""
    given: dict[str, Any] = {"channels": channels, "device": device, "dtype": dtype, "fast": fast}
    found = list(probes(module, **given))
    if takes_clips(module):
        found = [replace(probe, peak_bytes=0) for probe in found]
    return CostModel.fit(found, bytes_known=bytes_by_arithmetic(module, spatial=spatial, **given))


class CostModels:
    """Cost models by VAE, dtype and device; fitted when first asked for."""

    def __init__(self, file: Path | None = None) -> None:
        """Args:
        file: where models are kept from one process to the next; None: nowhere.
        """
        self._file = file
        self._lock = threading.Lock()
        self._models: dict[str, CostModel] = {}
        if file is not None and file.is_file():
            stored = json.loads(file.read_text(encoding="utf-8"))
            self._models = {key: CostModel.from_wire(wire) for key, wire in stored.items()}

    def get(
        self,
        name: str,
        module: Any,
        *,
        channels: int,
        spatial: int,
        device: torch.device,
        dtype: torch.dtype,
        fast: FastVae | None = None,
    ) -> CostModel:
        """The model of a loaded VAE. The caller holds the VAE's lock.

        Args:
            name: of the VAE and its weights.
            module: the VAE.
            channels: latent channels.
            spatial: pixels per latent pixel.
            device: where it is.
            dtype: of its weights.
            fast: its fast ways, where it has any.
        """
        key = _key(name, device=device, dtype=dtype)
        with self._lock:
            if key not in self._models:
                self._models[key] = fit(
                    module, channels=channels, spatial=spatial, device=device, dtype=dtype, fast=fast
                )
                self._store()
            return self._models[key]

    def known(self, name: str, *, device: torch.device, dtype: torch.dtype) -> CostModel | None:
        """The model of a VAE that was fitted; None if none was."""
        return self._models.get(_key(name, device=device, dtype=dtype))

    def _store(self) -> None:
        if self._file is not None:
            wire = {key: model.to_wire() for key, model in self._models.items()}
            self._file.write_text(json.dumps(wire, indent=1), encoding="utf-8")


def _key(name: str, *, device: torch.device, dtype: torch.dtype) -> str:
    return f"{name} {dtype} {_device_name(device)}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.get_num_threads()} threads"
