"""Other whole pipelines with a model of their own, or with one set up in a way of its own: upsamplers, refiners …"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from tests.parity import families_of_clips, families_of_frames, families_of_sections, families_of_tokens
from tests.parity.others_of_clips import clip
from tests.parity.variants import PICTURE, PICTURE_PAINTED, one_pooled, variant
from tests.parity.whole_pipelines import (
    GUARDED,
    HUGE,
    MASKED,
    SMALL,
    Whole,
    diffusers_class,
    ends,
    mask,
    one_text,
    part,
    small_picture,
    tiny,
)

_ONE_MASKED: Mapping[str, Any] = {"prompt_embeds": one_text, "prompt_attention_mask": lambda: mask(1)}


def _drawn(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(23))


# Pictures -----------------------------------------------------------------------------------------------------------


def _chroma() -> Any:
    """With what the config of lodestones/Chroma1-HD has besides, and its inpainting pipeline reads.

    diffusers keeps it, with a warning that it expects no such thing (huggingface/diffusers#12112).
    """
    config = dict(tiny("ChromaTransformer2DModel").config) | {"guidance_embeds": False}
    return diffusers_class("ChromaTransformer2DModel").from_config(config).eval()


_PICTURE_CASES: Mapping[str, Whole] = {
    "ChromaInpaint": variant(
        families_of_tokens.CASES["chroma"],
        "ChromaInpaintPipeline",
        parts={"transformer": _chroma},
        call={
            **PICTURE_PAINTED,
            "strength": 0.99,
            "prompt_embeds": one_text,
            "prompt_attention_mask": lambda: mask(1).bool(),
        },
        batch=1,
    ),
}

# Clips --------------------------------------------------------------------------------------------------------------


def _start(place: int) -> Callable[[], torch.Tensor]:
    """The clip, or the mask, by which EasyAnimate starts from a picture, made by its own module."""
    make = "pipelines.easyanimate.pipeline_easyanimate_inpaint.get_image_to_video_latent"
    return lambda: diffusers_class(make)([small_picture()], None, 9, (SMALL["height"], SMALL["width"]))[place]


#: What the control net takes from torchvision, which is no part of this: its mask of padding, at another size.
_RESIZING = SimpleNamespace(
    functional=SimpleNamespace(
        resize=lambda zeros, size, interpolation: F.interpolate(zeros, size, mode=interpolation)
    ),
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
)
#: With the default gamma, 1/3, the covariance of its noise is singular, which LAPACK refuses.
_HELIOS = part("HeliosScheduler", stages=2, stage_range=[0, 0.5, 1], gamma=0.25)
_PYRAMID: Mapping[str, Any] = {
    "height": 64,
    "width": 96,
    "num_frames": 9,  # two chunks
    "num_latent_frames_per_chunk": 2,
    "pyramid_num_inference_steps_list": [1, 1],
}
_CLIP_CASES: Mapping[str, Whole] = {
    "EasyAnimateInpaint": variant(
        families_of_clips.CASES["easyanimate"],
        "EasyAnimateInpaintPipeline",
        # the other way reads cache_mag_vae of the VAE's config, which diffusers' class does not have
        config={"in_channels": 48, "resize_inpaint_mask_directly": False},
        call={**_ONE_MASKED, "video": _start(0), "mask_video": _start(1)},
        batch=1,
    ),
    "Kandinsky5I2V": variant(
        families_of_clips.CASES["kandinsky5-video"],
        "Kandinsky5I2VPipeline",
        config={"visual_cond": True},
        call={
            **PICTURE,
            "prompt_embeds_qwen": one_text,
            "prompt_embeds_clip": one_pooled,
            "prompt_cu_seqlens": lambda: ends()[:2],
            "num_frames": 17,  # its first four latent frames are normalised by those that follow
        },
        batch=1,
    ),
    "AnyFlowFAR": variant(
        families_of_frames.CASES["anyflow"],
        "AnyFlowFARPipeline",
        denoiser="AnyFlowFARTransformer3DModel",
        # tracing takes seconds, and what is traced runs operator by operator all the same
        names={"torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": True},
    ),
    "SkyReelsV2DiffusionForcingVideoToVideo": variant(
        families_of_frames.CASES["skyreels-v2"],
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        scheduler=part("UniPCMultistepScheduler"),
        call={
            "prompt": None,
            "prompt_embeds": one_text,
            "video": lambda: clip(5),
            "overlap_history": 5,
            "num_frames": 13,  # two windows
            "base_num_frames": 9,
        },
        own_frames=5,
        batch=1,
    ),
    "Cosmos2_5_Transfer": variant(
        families_of_frames.CASES["cosmos25"],
        "Cosmos2_5_TransferPipeline",
        config={"in_channels": 17, "controlnet_block_every_n": 1},
        parts={"controlnet": lambda: tiny("CosmosControlNetModel")},
        names={**GUARDED, "diffusers.models.controlnets.controlnet_cosmos.transforms": _RESIZING},
        call={"controls": clip, "num_frames_per_chunk": 9},
    ),
    "HeliosPyramid": variant(
        families_of_sections.CASES["helios"],
        "HeliosPyramidPipeline",
        scheduler=_HELIOS,
        call=_PYRAMID,
        given={"frames_per_call": 2},
    ),
    "HeliosPyramid, from a picture": variant(
        families_of_sections.CASES["helios"],
        "HeliosPyramidPipeline",
        scheduler=_HELIOS,
        call={**_PYRAMID, **PICTURE, "prompt_embeds": one_text},
        given={"frames_per_call": 2, "additional_frames": 1},
        batch=1,
    ),
}

# Stages of LTX ------------------------------------------------------------------------------------------------------

_LTX2 = families_of_clips.CASES["ltx2"]
_STAGE: Mapping[str, Any] = {"height": 96, "width": 128, **MASKED, "use_cross_timestep": False}
_LTX_CASES: Mapping[str, Whole] = {
    "LTXLatentUpsample": Whole(
        pipeline="LTXLatentUpsamplePipeline",
        vae="ltx",
        part="latent_upsampler",
        denoiser="pipelines.ltx.modeling_latent_upsampler.LTXLatentUpsamplerModel",
        call={**HUGE, "latents": _drawn(2, 128, 2, 3, 4)},
        rounds=True,
    ),
    "LTXI2VLongMultiPrompt": Whole(
        pipeline="LTXI2VLongMultiPromptPipeline",
        vae="ltx",
        denoiser="LTXVideoTransformer3DModel",
        scheduler=part("LTXEulerAncestralRFScheduler"),
        answers={"encode_prompt": lambda: (one_text(), mask(1), None, None)},
        call={
            **HUGE,
            "prompt": "a fox",
            "num_frames": 17,
            "temporal_tile_size": 16,
            "temporal_overlap": 8,
            "decode_vertical_tiles": 2,
            "decode_horizontal_tiles": 3,
            "decode_overlap": 1,
        },
        given={"blended_tiles": "2x3+1"},
        batch=1,
    ),
    "LTX2LatentUpsample": Whole(
        pipeline="LTX2LatentUpsamplePipeline",
        vae="ltx2",
        part="latent_upsampler",
        denoiser="pipelines.ltx2.latent_upsampler.LTX2LatentUpsamplerModel",
        call={**HUGE, "latents": _drawn(2, 128, 2, 3, 4)},
    ),
    "LTX2DFR": Whole(
        pipeline="LTX2DFRPipeline",
        vae="ltx2",
        denoiser=_LTX2.denoiser,
        config={"use_keyframes_abs_pos_embedding": True},
        parts=_LTX2.parts,
        call={**_STAGE, "num_frames": 9, "sigmas": [1.0, 0.5]},
        given={"num_frames": 9},
    ),
    "LTX2DFRTemporalRefine": Whole(
        pipeline="LTX2DFRTemporalRefinePipeline",
        vae="ltx2",
        denoiser=_LTX2.denoiser,
        config={"use_keyframes_abs_pos_embedding": True},
        scheduler=part("LTXEulerAncestralRFScheduler", eta=0.5),
        parts={
            **_LTX2.parts,
            "temporal_latent_upsampler": lambda: tiny(
                "pipelines.ltx2.latent_upsampler.LTX2LatentUpsamplerModel",
                spatial_upsample=False,
                temporal_upsample=True,
            ),
        },
        call={
            **_STAGE,
            "num_frames": 25,
            "sigmas": [1.0, 0.5],
            "latents": _drawn(2, 128, 4, 3, 4),
            "keyframes_latents": _drawn(2, 128, 1, 3, 4),
            "keyframe_positions": [24],
            "audio_latents": _drawn(2, 2, 26, 2),
        },
    ),
}

CASES: Mapping[str, Whole] = {**_PICTURE_CASES, **_CLIP_CASES, **_LTX_CASES}
