"""For each layout: the way from the pipeline's latents to `decode`'s argument, and from its result to pictures.

The way in has three parts: `before` lays the latents out so that they can be denormalised (channels in dimension 1, the
patches of a batch norm as channels), then they are denormalised, and `after` makes of them what `decode` takes. The way
out, `finish`, makes pictures (n, 3, H, W) or clips (n, 3, F, H, W) of what the VAE returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from broker_config.latent_geometry import FrameRule, LatentLayout
from worker.latent_layouts import frames, tokens
from worker.latent_layouts.normalisation import denormalise
from worker.latent_layouts.plan import Plan

Step = Callable[[torch.Tensor, Plan], torch.Tensor]


def to_vae_input(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Latents as `vae.decode` takes them: unpacked and denormalised.

    Args:
        latents: in the VAE's dtype, on its device, laid out as `plan.layout`.
        plan: the layout, and what goes with it.

    Returns:
        (n, C, h, w) for image VAEs, frames folded into the batch; (n, C, f, h, w) for video VAEs. n is a multiple of
        `plan.batch`.
    """
    steps = _TABLE[plan.layout]
    latents = steps.before(latents, plan)
    return steps.after(denormalise(latents, plan.scaling, plan.latent_state), plan)


def finish(decoded: torch.Tensor, plan: Plan) -> torch.Tensor:
    """What the VAE returned as pictures (n, 3, H, W) or clips (n, 3, F, H, W)."""
    decoded = _TABLE[plan.layout].finish(decoded, plan)
    if plan.imagenet:
        decoded = frames.undo_imagenet(decoded)
    if plan.logc3:
        decoded = frames.expand_logc3(decoded)
    if plan.frames is FrameRule.EVEN:
        # pipelines/allegro/pipeline_allegro.py `decode_latents`, `__call__`: frames come first, and clips are cut.
        decoded = decoded.permute(0, 2, 1, 3, 4)[:, :, : plan.num_frames]
    if plan.resizes:
        decoded = frames.resize_and_crop(decoded, height=plan.height, width=plan.width)
    return decoded


def _same(tensor: torch.Tensor, plan: Plan) -> torch.Tensor:
    return tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Steps:
    before: Step = _same
    after: Step = _same
    finish: Step = _same


def _unpacked_before(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    return tokens.patchify(latents) if plan.latent_state.is_batch_norm else latents


def _unpacked_after(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    return tokens.unpatchify(latents) if plan.latent_state.is_batch_norm else latents


def _grid(plan: Plan, patch: int) -> tuple[int, int]:
    """Rows and columns of patches; `plan`'s size is what the grid decodes to (`sizes.measure`)."""
    side = plan.spatial * patch
    return plan.height // side, plan.width // side


def _unpack(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    rows, columns = _grid(plan, plan.patch_size)
    return tokens.unpack(latents, rows=rows, columns=columns, patch=plan.patch_size)


def _unpack_frame(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    return _unpack(latents, plan).unsqueeze(2)  # B, C, 1, h, w


def _unpack_layers(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    rows, columns = _grid(plan, 2)
    assert plan.facts.layers is not None, "checked at submit"
    return tokens.unpack_layers(latents, layers=plan.facts.layers, rows=rows, columns=columns)


def _unpack_video(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    rows, columns = _grid(plan, plan.patch_size)
    latent_frames = (plan.num_frames - 1) // plan.temporal + 1
    return tokens.unpack_video(latents, frames=latent_frames, rows=rows, columns=columns, patch=plan.patch_size)


def _twice_at_the_end(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The last latent frame once more, whose frames are dropped again.

    Source: pipelines/ltx/pipeline_ltx_i2v_long_multi_prompt.py `vae_decode_tiled` (last_frame_fix).
    """
    return torch.cat([latents, latents[:, :, -1:]], dim=2)


def _unpack_grid(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    rows, columns = _grid(plan, 2)
    return tokens.tokens_to_grid(latents, rows=rows, columns=columns)


def _skip_frames(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    skip = plan.facts.additional_frames or 0
    return latents[:, :, skip:] if skip else latents


def _asked_frames(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Source: pipelines/ltx2/utils.py `trim_canvas`."""
    return latents[:, :, : (plan.num_frames - 1) // plan.temporal + 1]


def _item_patches(latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    rows, columns = _grid(plan, latents.shape[-1])
    return tokens.item_patches(latents, rows=rows, columns=columns)


def _one_frame(decoded: torch.Tensor, plan: Plan) -> torch.Tensor:
    return decoded[:, :, 0]


def _last_item(decoded: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(B·n, 3, 1, H, W) → (B, 3, H, W), the last of the n.

    Source: pipelines/joyimage/pipeline_joyimage_edit.py `JoyImageEditPipeline.__call__`.
    """
    decoded = torch.unflatten(decoded, 0, (plan.batch, -1))  # B, n, 3, 1, H, W
    return decoded.float()[:, -1, :, 0]


_TABLE: Final[Mapping[LatentLayout, _Steps]] = {
    LatentLayout.UNPACKED: _Steps(before=_unpacked_before, after=_unpacked_after),
    LatentLayout.PACKED: _Steps(before=_unpack),
    LatentLayout.VIDEO: _Steps(before=_skip_frames),
    # pipelines/kandinsky6/pipeline_kandinsky6_ti2va.py __call__: permuted from (B, f, h, w, C), and decoded like that
    LatentLayout.VIDEO_CHANNELS_LAST: _Steps(
        before=lambda latents, _: latents.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    ),
    LatentLayout.VIDEO_2D: _Steps(after=lambda latents, _: frames.fold_frames(latents)),
    # pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py decode_latents: B, F, C, h, w → B·F, C, h, w
    LatentLayout.FRAMES_2D: _Steps(before=lambda latents, _: latents.flatten(0, 1)),
    LatentLayout.FRAMES_FIRST: _Steps(
        before=lambda latents, plan: frames.frames_first(latents, skip=plan.facts.additional_frames or 0)
    ),
    LatentLayout.CHANNELS_LAST: _Steps(before=lambda latents, _: frames.channels_last(latents)),
    # pipelines/kandinsky5/pipeline_kandinsky_t2i.py __call__: the frame is dropped before the decode
    LatentLayout.CHANNELS_LAST_IMAGE: _Steps(before=lambda latents, _: frames.channels_last_image(latents)),
    LatentLayout.FRAME: _Steps(finish=_one_frame),
    LatentLayout.UNPACKED_FRAME: _Steps(before=lambda latents, _: latents.unsqueeze(2), finish=_one_frame),
    LatentLayout.PACKED_FRAME: _Steps(before=_unpack_frame, finish=_one_frame),
    LatentLayout.LAYERS: _Steps(before=_unpack_layers, finish=_one_frame),
    LatentLayout.PACKED_VIDEO: _Steps(before=_unpack_video),
    LatentLayout.PATCHED: _Steps(after=lambda latents, _: tokens.unpatchify(latents)),
    LatentLayout.PACKED_PATCHED: _Steps(before=_unpack_grid, after=lambda latents, _: tokens.unpatchify(latents)),
    LatentLayout.PACKED_PATCHED_LAST: _Steps(
        before=_unpack_grid, after=lambda latents, _: tokens.unpatchify_last(latents)
    ),
    LatentLayout.FRAME_PAIRS: _Steps(after=lambda latents, _: frames.split_frame_pairs(latents), finish=_one_frame),
    # B, n, C, 1, h, w → B·n, C, 1, h, w
    LatentLayout.ITEMS: _Steps(before=lambda latents, _: latents.flatten(0, 1), finish=_last_item),
    LatentLayout.ITEM_PATCHES: _Steps(before=_item_patches, finish=lambda decoded, _: decoded.float().squeeze(2)),
    LatentLayout.VIDEO_REASONED: _Steps(),
    LatentLayout.VIDEO_CHUNKS: _Steps(before=_skip_frames),
    LatentLayout.VIDEO_CANVAS: _Steps(before=_asked_frames),
    LatentLayout.VIDEO_SECTIONS: _Steps(),
    LatentLayout.VIDEO_BLENDED: _Steps(after=_twice_at_the_end),
}
