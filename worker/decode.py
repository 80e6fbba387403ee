"""Decode: latents and a VAE in, pixels out. Knows nothing of queues.

The order of operations is the pipelines': cast to the VAE's dtype, undo the layout and the scaling, decode
under `inference_mode`, then what `VaeImageProcessor.postprocess` / `VideoProcessor.postprocess_video` do,
which is run on the device so that only uint8 crosses to the host.
"""

from __future__ import annotations

import base64
import dataclasses
import inspect
import itertools
import zlib
from collections.abc import Callable, Generator, Mapping
from typing import Any, Final

import torch

from broker_config.errors import InvalidOption
from broker_config.latent_geometry import LatentFacts, LatentLayout, LatentState
from worker.blended_tiles import decode_in_tiles
from worker.frame_stream import can_stream, stream_frames
from worker.in_parts import in_parts
from worker.latent_layouts import Plan, finish, to_vae_input
from worker.latent_layouts.frames import unfold_frames

#: Frames an image VAE decodes in one call (pipeline_animatediff.py `__call__`, decode_chunk_size=16).
FRAMES_PER_CALL: Final = 16
#: Layouts whose frames are folded into the batch.
FOLDED: Final = frozenset({LatentLayout.VIDEO_2D, LatentLayout.FRAMES_2D})
#: VAEs that decode from noise, drawn from the generator they are given.
_FROM_NOISE: Final = frozenset({"ConsistencyDecoderVAE"})
#: Layouts of clips that the VAE decodes as a whole and that need nothing afterwards.
_BY_FRAMES: Final = frozenset(
    {LatentLayout.VIDEO, LatentLayout.FRAMES_FIRST, LatentLayout.VIDEO_CHANNELS_LAST, LatentLayout.CHANNELS_LAST}
)


def decode_chunks(
    vae: Any,
    latents: torch.Tensor,
    plan: Plan,
    *,
    items_per_call: int | None = None,
    first: int = 0,
    by_frames: bool = False,
) -> Generator[torch.Tensor, None, None]:
    """The VAE's own output, in pieces, each as soon as the device has it.

    Args:
        vae: a diffusers autoencoder.
        latents: on any device, float, laid out as `plan.layout`.
        plan: sizes and scaling.
        items_per_call: pictures or clips in one call of the VAE (of an image VAE: at most 16 of the clips' frames);
            None: as many as the pipeline takes. Fewer need less memory and may differ from the pipeline in last bits.
        first: pieces that are not wanted again.
        by_frames: whether a clip may come in groups of frames, where the VAE can make them one after the other.

    Yields:
        Pictures: (n, 3, H, W), all B at once unless `items_per_call` is smaller. Clips of a video VAE:
        (n, 3, F, H, W), or with `by_frames` (1, 3, n ≤ F, H, W). Clips of an image VAE: (n, 3, H, W), n ≤ 16 frames of
        the folded batch, in order.
        Four channels instead of three where the VAE makes RGBA.

    Raises:
        InvalidOption: the VAE needs a fact the job lacks, or cannot do what the job asks.
    """
    with torch.inference_mode():
        if hasattr(vae, "_clear_conv_cache"):  # EasyAnimate's VAE clears it after a decode only: one may have failed
            vae._clear_conv_cache()
        latents = latents.to(device=vae.device, dtype=vae.dtype)
        vae_input = to_vae_input(latents, plan)
        vae_input, timestep = mix_noise(vae_input, vae, plan)
        step = step_of(vae_input.shape[0], plan, items_per_call)
        if by_frames and step == 1 and plan.layout in _BY_FRAMES and can_stream(vae):
            pieces = (piece for clip in torch.split(vae_input, 1) for piece in stream_frames(vae, clip))
            for piece in itertools.islice(pieces, first, None):
                yield finish(piece, plan)
            return
        call = _CALLS.get(plan.layout, _whole)
        own = {"generator": noise_generator(plan.facts)} if type(vae).__name__ in _FROM_NOISE else {}
        for start in range(first * step, vae_input.shape[0], step):
            part = vae_input[start : start + step]
            keywords = own if timestep is None else {"temb": timestep[start : start + step]}
            part_plan = dataclasses.replace(plan, batch=max(1, plan.batch * part.shape[0] // vae_input.shape[0]))
            yield finish(call(vae, part, part_plan, keywords), part_plan)


def step_of(count: int, plan: Plan, items_per_call: int | None) -> int:
    """Elements of the VAE's batch in one call.

    Args:
        count: elements in all.
        plan: how many pictures or clips they are.
        items_per_call: pictures or clips in one call; None: as many as the pipeline takes.
    """
    if plan.layout is LatentLayout.ITEM_PATCHES:
        return 1  # pipeline_joyimage_edit_plus.py `__call__` decodes its pictures in a loop
    items = plan.batch if items_per_call is None else min(plan.batch, items_per_call)
    step = max(1, items * (count // plan.batch))
    if plan.layout in FOLDED:
        step = min(folded_at_once(plan.layout, plan.num_frames, asked=plan.facts.frames_per_call), step)
    return step


def folded_at_once(layout: str, num_frames: int, *, asked: int | None) -> int:
    """Most frames in one call of a layout that folds them into the batch, whatever clips they are of.

    Args:
        layout: one of `FOLDED`.
        num_frames: of a clip.
        asked: the job's `frames_per_call`.
    """
    # pipeline_stable_video_diffusion.py `__call__`: decode_chunk_size is the clip's number of frames
    usual = num_frames if layout == LatentLayout.FRAMES_2D else FRAMES_PER_CALL
    return asked or usual


def mix_noise(vae_input: torch.Tensor, vae: Any, plan: Plan) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a VAE with timestep conditioning takes: latents with some noise, and the timestep of each.

    The noise is what the pipeline's generator would have drawn next.

    Source: pipelines/ltx/pipeline_ltx.py `LTXPipeline.__call__`; utils/torch_utils.py `randn_tensor`.

    Raises:
        InvalidOption: `decode_timestep`, or where noise starts, is missing; or they mean nothing to this VAE.
    """
    facts, wanted = plan.facts, bool(vae.config.get("timestep_conditioning", False))
    if not wanted:
        if facts.decode_timestep is not None and "timestep_conditioning" not in vae.config:
            raise InvalidOption("decode_timestep means nothing to this VAE: leave it out", field="decode_timestep")
        return vae_input, None
    batch = vae_input.shape[0]
    if plan.latent_state is LatentState.DENORMALISED:
        if facts.decode_timestep is None or facts.decode_noise_scale != 0:
            raise InvalidOption(
                "state is denormalised, but this VAE mixes noise into latents that are still normalised: mix it in "
                "first, and give decode_timestep with decode_noise_scale 0",
                field="state",
            )
        return vae_input, torch.tensor([facts.decode_timestep] * batch, device=vae_input.device, dtype=vae_input.dtype)
    if facts.decode_timestep is None:
        raise InvalidOption("decode_timestep is missing, which this VAE decodes by", field="decode_timestep")
    timestep = torch.tensor([facts.decode_timestep] * batch, device=vae_input.device, dtype=vae_input.dtype)
    scale = facts.decode_noise_scale
    if scale is None and plan.layout is LatentLayout.VIDEO_BLENDED:
        return vae_input, timestep  # pipeline_ltx_i2v_long_multi_prompt.py `vae_decode_tiled` mixes in what it is told
    scale = facts.decode_timestep if scale is None else scale
    generator = noise_generator(facts)
    noise = torch.randn(vae_input.shape, generator=generator, dtype=vae_input.dtype).to(vae_input.device)
    share = torch.tensor([scale] * batch, device=vae_input.device, dtype=vae_input.dtype)[:, None, None, None, None]
    return (1 - share) * vae_input + share * noise, timestep


def noise_generator(facts: LatentFacts) -> torch.Generator:
    """The CPU generator that noise is drawn from: of a seed, or as the pipeline left it.

    Raises:
        InvalidOption: neither is known, or the state is none.
    """
    generator = torch.Generator("cpu")
    if facts.noise_state is not None:
        try:
            packed = base64.urlsafe_b64decode(facts.noise_state + "=" * (-len(facts.noise_state) % 4))
            state = bytearray(zlib.decompressobj().decompress(packed, generator.get_state().numel()))
            return generator.set_state(torch.frombuffer(state, dtype=torch.uint8))
        except (ValueError, RuntimeError, zlib.error) as error:
            raise InvalidOption(f"noise_state is no generator's: {error}", field="noise_state") from error
    if facts.seed is None:
        raise InvalidOption("seed is missing, which this VAE decodes by", field="seed")
    return generator.manual_seed(facts.seed)


def join_chunks(chunks: list[torch.Tensor], plan: Plan) -> torch.Tensor:
    """The chunks as the tensor the pipeline returns for `output_type="pt"` before postprocessing.

    Returns:
        (B, 3, H, W) for pictures, (B, 3, F, H, W) for clips.
    """
    whole = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
    return unfold_frames(whole, num_frames=plan.num_frames) if plan.layout in FOLDED else whole


def to_pixels(decoded: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Decoded floats to uint8 pixels, on their device.

    Args:
        decoded: (…, 3, H, W), any float dtype: in [0, 1] where `plan` says `imagenet`, else in [-1, 1].
        plan: what they were decoded by.

    Returns:
        (…, H, W, 3) uint8: the values PIL images of the pipeline have.

    Source: image_processor.py `VaeImageProcessor.postprocess`, `denormalize` ((x·0.5 + 0.5) clamped to [0, 1], in
    the VAE's dtype), `pt_to_numpy` (to float32), `numpy_to_pil` ((x·255) rounded half to even). Cut:
    pipelines/cosmos/pipeline_cosmos_text2world.py `__call__`, whose guardrail gets `(video * 255).astype(np.uint8)`.
    """
    with torch.inference_mode():
        pictures = decoded.flatten(0, -4) if decoded.ndim > 3 else decoded[None]
        count, channels, height, width = pictures.shape
        out = pictures.new_empty(count, height, width, channels, dtype=torch.uint8)
        for part, pixels in zip(in_parts(pictures), in_parts(out), strict=True):
            values = (part if plan.imagenet else (part * 0.5 + 0.5).clamp(0, 1)).float().mul(255)
            pixels.copy_((values if plan.cut else values.round()).movedim(-3, -1))
        return out.view(*decoded.shape[:-3], height, width, channels)


def clip_frames(chunk: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A chunk of a clip as frames in order: (n, 3, H, W), the clips of a batch one after the other."""
    if plan.layout in FOLDED or not plan.is_video:
        return chunk
    # B, 3, F, H, W → B, F, 3, H, W → B·F, 3, H, W
    return chunk.transpose(1, 2).flatten(0, 1)


Call = Callable[[Any, torch.Tensor, Plan, Mapping[str, Any]], torch.Tensor]


def _whole(vae: Any, vae_input: torch.Tensor, plan: Plan, keywords: Mapping[str, Any]) -> torch.Tensor:
    decoded: torch.Tensor = vae.decode(vae_input, return_dict=False, **keywords)[0]
    return decoded


def _frames_2d(vae: Any, vae_input: torch.Tensor, plan: Plan, keywords: Mapping[str, Any]) -> torch.Tensor:
    """A group of frames; a VAE that mixes neighbouring frames is told how many there are.

    Source: pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py `decode_latents`.
    """
    if "num_frames" in inspect.signature(vae.forward).parameters:
        keywords = {**keywords, "num_frames": vae_input.shape[0]}
    return _whole(vae, vae_input, plan, keywords)


def _reasoned(vae: Any, vae_input: torch.Tensor, plan: Plan, keywords: Mapping[str, Any]) -> torch.Tensor:
    """The frames that lead to the edit, then those of the edit, decoded apart.

    Source: pipelines/chronoedit/pipeline_chronoedit.py `ChronoEditPipeline.__call__` (enable_temporal_reasoning).
    """
    if vae_input.shape[2] <= 2:
        return _whole(vae, vae_input, plan, keywords)
    edit = _whole(vae, vae_input[:, :, [0, -1]], plan, keywords)
    reasoning = _whole(vae, vae_input[:, :, :-1], plan, keywords)
    return torch.cat([reasoning, edit[:, :, 1:]], dim=2)


def _in_chunks(vae: Any, vae_input: torch.Tensor, plan: Plan, keywords: Mapping[str, Any]) -> torch.Tensor:
    """A few latent frames at a time, each group afresh.

    Source: pipelines/helios/pipeline_helios.py `HeliosPipeline.__call__`.
    """
    assert plan.facts.frames_per_call is not None, "checked at submit"
    groups = torch.split(vae_input, plan.facts.frames_per_call, dim=2)
    made: torch.Tensor | None = None
    done = 0
    for group in groups:
        part = _whole(vae, group, plan, keywords)
        if made is None:
            made = part.new_empty(*part.shape[:2], plan.num_frames, *part.shape[3:])
        part = part[:, :, : plan.num_frames - done]
        made[:, :, done : done + part.shape[2]] = part
        done += part.shape[2]
    assert made is not None
    return made[:, :, :done]


def _in_sections(vae: Any, vae_input: torch.Tensor, plan: Plan, keywords: Mapping[str, Any]) -> torch.Tensor:
    """Sections from the last to the first; each but the last is decoded with the one behind it, and blended with it.

    Source: pipelines/hunyuan_video/pipeline_hunyuan_video_framepack.py `HunyuanVideoFramepackPipeline.__call__`
    (inverted_anti_drifting), `_soft_append`. The first latent frame is the picture's, and goes with the first section.
    """
    each = plan.facts.frames_per_call
    assert each is not None, "checked at submit"
    latent_frames = vae_input.shape[2]
    overlap = (each - 1) * plan.temporal + 1
    video: torch.Tensor | None = None
    for start in (*range(latent_frames - each, 1, -each), 0):
        known = vae_input[:, :, start:]
        if video is None:
            video = _whole(vae, known, plan, keywords)
            continue
        current = _whole(vae, known[:, :, : 2 * each + (start == 0)], plan, keywords)
        weights = torch.linspace(1, 0, overlap, dtype=current.dtype, device=current.device).view(1, 1, -1, 1, 1)
        blended = weights * current[:, :, -overlap:] + (1 - weights) * video[:, :, :overlap]
        video = torch.cat([current[:, :, :-overlap], blended, video[:, :, overlap:]], dim=2)
    assert video is not None
    return video


def _in_tiles(vae: Any, vae_input: torch.Tensor, plan: Plan, keywords: Mapping[str, Any]) -> torch.Tensor:
    """Tiles of pictures; what the repeated last latent frame makes is left out.

    Source: pipelines/ltx/pipeline_ltx_i2v_long_multi_prompt.py `LTXI2VLongMultiPromptPipeline.vae_decode_tiled`.
    """
    made = decode_in_tiles(
        vae_input,
        tiles=plan.facts.tiles,
        spatial=plan.spatial,
        decode=lambda tile: _whole(vae, tile, plan, keywords),
    )
    return made.to(vae_input.dtype)[:, :, : plan.num_frames]


_CALLS: Final[Mapping[LatentLayout, Call]] = {
    LatentLayout.FRAMES_2D: _frames_2d,
    LatentLayout.VIDEO_REASONED: _reasoned,
    LatentLayout.VIDEO_CHUNKS: _in_chunks,
    LatentLayout.VIDEO_SECTIONS: _in_sections,
    LatentLayout.VIDEO_BLENDED: _in_tiles,
}
