"""Families of clips that an image VAE decodes frame by frame, or Wan's VAE as a whole: a whole pipeline of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.parity.whole_pipelines import (
    FROM_PICTURE,
    FROM_WORDS,
    GUARDED,
    LARGE,
    MASKED,
    PROMPT,
    SMALL,
    UNGUIDED,
    Whole,
    euler,
    no_guidance,
    one_text,
    part,
    picture,
    small_picture,
    text,
    tokenizer,
)


def _clip(frames: int, *, height: int = SMALL["height"], width: int = SMALL["width"]) -> list[Any]:
    return [picture(height=height, width=width)] * frames


class _Cropping:
    """I2VGen-XL crops its picture to the size its image encoder takes."""

    crop_size: Mapping[str, int] = {"height": 32, "width": 32}


_CHRONOEDIT = Whole(
    pipeline="ChronoEditPipeline",
    vae="chronoedit",
    denoiser="ChronoEditTransformer3DModel",
    answers={"encode_image": one_text},
    call={**FROM_PICTURE, "num_frames": 5},
    batch=1,
)
_SANA_VIDEO = Whole(
    pipeline="SanaVideoPipeline",
    vae="sana-video",
    denoiser="SanaVideoTransformer3DModel",
    scheduler=part("FlowMatchEulerDiscreteScheduler"),
    call={**MASKED, **UNGUIDED, "height": 64, "width": 96, "frames": 9, "use_resolution_binning": False},
)

CASES: Mapping[str, Whole] = {
    "text-to-video": Whole(
        pipeline="TextToVideoSDPipeline",
        vae="text-to-video",
        denoiser="UNet3DConditionModel",
        part="unet",
        scheduler=part("DDIMScheduler"),
        call={**FROM_WORDS, "num_frames": 9},
    ),
    "i2vgen-xl": Whole(
        pipeline="I2VGenXLPipeline",
        vae="i2vgen-xl",
        denoiser="I2VGenXLUNet",
        part="unet",
        scheduler=part("DDIMScheduler"),
        parts={"feature_extractor": _Cropping},
        answers={"_encode_image": lambda: text(1, 1)},
        call={
            **SMALL,
            **UNGUIDED,
            "prompt_embeds": one_text,
            "negative_prompt_embeds": one_text,
            "image": small_picture,
            "num_frames": 3,
        },
        batch=1,
    ),
    "latte": Whole(
        pipeline="LattePipeline",
        vae="latte",
        denoiser="LatteTransformer3DModel",
        scheduler=part("DDIMScheduler"),
        call={**FROM_WORDS, "video_length": 9, "clean_caption": False, "mask_feature": False},
    ),
    "svd": Whole(
        pipeline="StableVideoDiffusionPipeline",
        vae="svd",
        denoiser="UNetSpatioTemporalConditionModel",
        part="unet",
        scheduler=part("EulerDiscreteScheduler", prediction_type="v_prediction", use_karras_sigmas=True),
        answers={"_encode_image": lambda: text(2, 1)},
        call={**SMALL, "image": lambda: _clip(2), "num_frames": 3, "max_guidance_scale": 1.0},
    ),
    "wan": Whole(
        pipeline="WanPipeline",
        vae="wan",
        denoiser="WanTransformer3DModel",
        config={"in_channels": 16, "out_channels": 16},
        call={**FROM_WORDS, "num_frames": 9},
    ),
    "wan22-5b": Whole(
        pipeline="WanPipeline",
        vae="wan22-5b",
        denoiser="WanTransformer3DModel",
        config={"in_channels": 48, "out_channels": 48},
        parts={"expand_timesteps": True},
        call={**LARGE, **PROMPT, **UNGUIDED, "num_frames": 5},
    ),
    "wan, with a reference picture in front": Whole(
        pipeline="WanVACEPipeline",
        vae="wan",
        denoiser="WanVACETransformer3DModel",
        call={
            **SMALL,
            **UNGUIDED,
            "prompt_embeds": one_text,
            "num_frames": 9,
            "reference_images": small_picture,
        },
        given={"additional_frames": 1},
        batch=1,
    ),
    "wan-animate": Whole(
        pipeline="WanAnimatePipeline",
        vae="wan-animate",
        denoiser="WanAnimateTransformer3DModel",
        answers={"encode_image": one_text},
        call={
            **SMALL,
            "prompt_embeds": one_text,
            "image": small_picture,
            "pose_video": lambda: _clip(9),
            "face_video": lambda: _clip(9, height=16, width=16),
            "segment_frame_length": 9,
            "prev_segment_conditioning_frames": 1,
        },
        batch=1,
    ),
    "skyreels-v2": Whole(
        pipeline="SkyReelsV2Pipeline",
        vae="skyreels-v2",
        denoiser="SkyReelsV2Transformer3DModel",
        call={**FROM_WORDS, "num_frames": 9},
    ),
    "chronoedit": _CHRONOEDIT,
    "chronoedit that reasons": replace(
        _CHRONOEDIT,
        call={
            **FROM_PICTURE,
            "num_frames": 13,
            "enable_temporal_reasoning": True,
            "num_temporal_reasoning_steps": 2,
        },
        given={"layout": "video_reasoned"},
    ),
    "lucy-edit": Whole(
        pipeline="LucyEditPipeline",
        vae="lucy-edit",
        denoiser="WanTransformer3DModel",
        config={"in_channels": 96, "out_channels": 48},
        call={
            **LARGE,
            **UNGUIDED,
            "prompt_embeds": one_text,
            "video": lambda: _clip(5, **LARGE),
            "num_frames": 5,
        },
        batch=1,
    ),
    "anyflow": Whole(
        pipeline="AnyFlowPipeline",
        vae="anyflow",
        denoiser="AnyFlowTransformer3DModel",
        scheduler=part("FlowMapEulerDiscreteScheduler"),
        call={**FROM_WORDS, "num_frames": 9},
    ),
    "motif-video": Whole(
        pipeline="MotifVideoPipeline",
        vae="motif-video",
        denoiser="MotifVideoTransformer3DModel",
        parts={"guider": no_guidance},
        call={**SMALL, **MASKED, "num_frames": 5},
    ),
    "sana-video": _SANA_VIDEO,
    "sana-video-ltx2": replace(
        _SANA_VIDEO,
        vae="sana-video-ltx2",
        config={"in_channels": 128, "out_channels": 128, "patch_size": [1, 1, 1]},
    ),
    "cosmos2": Whole(
        pipeline="Cosmos2VideoToWorldPipeline",
        vae="cosmos2",
        denoiser="CosmosTransformer3DModel",
        config={"in_channels": 17},
        scheduler=euler(use_karras_sigmas=True),
        names=GUARDED,
        call={
            **FROM_PICTURE,
            "num_frames": 9,
        },
        batch=1,
    ),
    "cosmos25": Whole(
        pipeline="Cosmos2_5_PredictBasePipeline",
        vae="cosmos25",
        denoiser="CosmosTransformer3DModel",
        config={"in_channels": 17},
        scheduler=part("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction"),
        names=GUARDED,
        call={**SMALL, **UNGUIDED, "prompt_embeds": one_text, "num_frames": 9},
        batch=1,
    ),
    "cosmos3": Whole(
        pipeline="Cosmos3OmniPipeline",
        vae="cosmos3",
        denoiser="Cosmos3OmniTransformer",
        scheduler=part("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction"),
        parts={"text_tokenizer": tokenizer},
        names=GUARDED,
        answers={"tokenize_prompt": lambda: ([1, 2, 3], [1])},
        call={**LARGE, **UNGUIDED, "prompt": "a fox", "num_frames": 5},
        batch=1,
    ),
}
