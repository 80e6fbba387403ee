"""Families of clips that an image VAE decodes frame by frame, or Wan's VAE as a whole: a whole pipeline of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.parity.tiny_denoisers import COSMOS
from tests.parity.whole_pipelines import (
    GUARDED,
    LARGE,
    MASKED,
    PROMPT,
    SMALL,
    TEXT,
    UNGUIDED,
    Whole,
    diffusers_class,
    euler,
    part,
    picture,
    text,
    tokenizer,
)

#: A UNet with time, of two levels.
_UNET_3D = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 4,
    "norm_num_groups": 2,
}
#: Wan's transformer and its kin.
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}
_SANA_VIDEO = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": TEXT,
    "sample_size": 30,
    "rope_max_seq_len": 32,
}


def _clip(frames: int, *, height: int = SMALL["height"], width: int = SMALL["width"]) -> list[Any]:
    return [picture(height=height, width=width)] * frames


class _Cropping:
    """I2VGen-XL crops its picture to the size its image encoder takes."""

    crop_size: Mapping[str, int] = {"height": 32, "width": 32}


def _no_guidance() -> Any:
    return diffusers_class("guiders.ClassifierFreeGuidance")(guidance_scale=1.0)


_EDIT = {**_WAN, "in_channels": 36, "image_dim": TEXT}
_EDITED = {**SMALL, **UNGUIDED, "prompt_embeds": lambda: text(1), "image": lambda: picture(**SMALL)}

CASES: Mapping[str, Whole] = {
    "text-to-video": Whole(
        pipeline="TextToVideoSDPipeline",
        vae="text-to-video",
        denoiser="UNet3DConditionModel",
        config=_UNET_3D,
        part="unet",
        scheduler=part("DDIMScheduler"),
        call={**SMALL, **PROMPT, **UNGUIDED, "num_frames": 9},
    ),
    "i2vgen-xl": Whole(
        pipeline="I2VGenXLPipeline",
        vae="i2vgen-xl",
        denoiser="I2VGenXLUNet",
        config=_UNET_3D,
        part="unet",
        scheduler=part("DDIMScheduler"),
        parts={"feature_extractor": _Cropping},
        answers={"_encode_image": lambda: text(1, 1)},
        call={
            **SMALL,
            **UNGUIDED,
            "prompt_embeds": lambda: text(1),
            "negative_prompt_embeds": lambda: text(1),
            "image": lambda: picture(**SMALL),
            "num_frames": 3,
        },
        batch=1,
    ),
    "latte": Whole(
        pipeline="LattePipeline",
        vae="latte",
        denoiser="LatteTransformer3DModel",
        config={
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "num_attention_heads": 1,
            "attention_head_dim": 8,
            "cross_attention_dim": 8,
            "caption_channels": TEXT,
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 9,
        },
        scheduler=part("DDIMScheduler"),
        call={**SMALL, **PROMPT, **UNGUIDED, "video_length": 9, "clean_caption": False, "mask_feature": False},
    ),
    "svd": Whole(
        pipeline="StableVideoDiffusionPipeline",
        vae="svd",
        denoiser="UNetSpatioTemporalConditionModel",
        config={
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "block_out_channels": (32, 64),
            "num_attention_heads": (2, 4),
            "layers_per_block": 1,
            "cross_attention_dim": TEXT,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "num_frames": 3,
        },
        part="unet",
        scheduler=part("EulerDiscreteScheduler", prediction_type="v_prediction", use_karras_sigmas=True),
        answers={"_encode_image": lambda: text(2, 1)},
        call={**SMALL, "image": lambda: _clip(2), "num_frames": 3, "max_guidance_scale": 1.0},
    ),
    "wan": Whole(
        pipeline="WanPipeline",
        vae="wan",
        denoiser="WanTransformer3DModel",
        config=_WAN,
        call={**SMALL, **PROMPT, **UNGUIDED, "num_frames": 9},
    ),
    "wan22-5b": Whole(
        pipeline="WanPipeline",
        vae="wan22-5b",
        denoiser="WanTransformer3DModel",
        config={**_WAN, "in_channels": 48, "out_channels": 48},
        parts={"expand_timesteps": True},
        call={**LARGE, **PROMPT, **UNGUIDED, "num_frames": 5},
    ),
    "wan, with a reference picture in front": Whole(
        pipeline="WanVACEPipeline",
        vae="wan",
        denoiser="WanVACETransformer3DModel",
        config={**_WAN, "num_layers": 2, "vace_layers": [0, 1], "vace_in_channels": 96},
        call={
            **SMALL,
            **UNGUIDED,
            "prompt_embeds": lambda: text(1),
            "num_frames": 9,
            "reference_images": lambda: picture(**SMALL),
        },
        given={"additional_frames": 1},
        batch=1,
    ),
    "wan-animate": Whole(
        pipeline="WanAnimatePipeline",
        vae="wan-animate",
        denoiser="WanAnimateTransformer3DModel",
        config={
            **_WAN,
            "num_layers": 2,
            "in_channels": 36,
            "image_dim": TEXT,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        answers={"encode_image": lambda: text(1)},
        call={
            **SMALL,
            "prompt_embeds": lambda: text(1),
            "image": lambda: picture(**SMALL),
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
        config=_WAN,
        call={**SMALL, **PROMPT, **UNGUIDED, "num_frames": 9},
    ),
    "chronoedit": Whole(
        pipeline="ChronoEditPipeline",
        vae="chronoedit",
        denoiser="ChronoEditTransformer3DModel",
        config=_EDIT,
        answers={"encode_image": lambda: text(1)},
        call={**_EDITED, "num_frames": 5},
        batch=1,
    ),
    "chronoedit that reasons": Whole(
        pipeline="ChronoEditPipeline",
        vae="chronoedit",
        denoiser="ChronoEditTransformer3DModel",
        config=_EDIT,
        answers={"encode_image": lambda: text(1)},
        call={**_EDITED, "num_frames": 13, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2},
        given={"layout": "video_reasoned"},
        batch=1,
    ),
    "lucy-edit": Whole(
        pipeline="LucyEditPipeline",
        vae="lucy-edit",
        denoiser="WanTransformer3DModel",
        config={**_WAN, "in_channels": 96, "out_channels": 48},
        call={
            **LARGE,
            **UNGUIDED,
            "prompt_embeds": lambda: text(1),
            "video": lambda: _clip(5, **LARGE),
            "num_frames": 5,
        },
        batch=1,
    ),
    "anyflow": Whole(
        pipeline="AnyFlowPipeline",
        vae="anyflow",
        denoiser="AnyFlowTransformer3DModel",
        config=_WAN,
        scheduler=part("FlowMapEulerDiscreteScheduler"),
        call={**SMALL, **PROMPT, **UNGUIDED, "num_frames": 9},
    ),
    "motif-video": Whole(
        pipeline="MotifVideoPipeline",
        vae="motif-video",
        denoiser="MotifVideoTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_embed_dim": TEXT,
            "rope_axes_dim": (4, 6, 6),
        },
        parts={"guider": _no_guidance},
        call={**SMALL, **MASKED, "num_frames": 5},
    ),
    "sana-video": Whole(
        pipeline="SanaVideoPipeline",
        vae="sana-video",
        denoiser="SanaVideoTransformer3DModel",
        config=_SANA_VIDEO,
        scheduler=part("FlowMatchEulerDiscreteScheduler"),
        call={**MASKED, **UNGUIDED, "height": 64, "width": 96, "frames": 9, "use_resolution_binning": False},
    ),
    "sana-video-ltx2": Whole(
        pipeline="SanaVideoPipeline",
        vae="sana-video-ltx2",
        denoiser="SanaVideoTransformer3DModel",
        config={**_SANA_VIDEO, "in_channels": 128, "out_channels": 128, "patch_size": (1, 1, 1)},
        scheduler=part("FlowMatchEulerDiscreteScheduler"),
        call={**MASKED, **UNGUIDED, "height": 64, "width": 96, "frames": 9, "use_resolution_binning": False},
    ),
    "cosmos2": Whole(
        pipeline="Cosmos2VideoToWorldPipeline",
        vae="cosmos2",
        denoiser="CosmosTransformer3DModel",
        config={**COSMOS, "in_channels": 17},
        scheduler=euler(use_karras_sigmas=True),
        names=GUARDED,
        call={
            **SMALL,
            **UNGUIDED,
            "prompt_embeds": lambda: text(1),
            "image": lambda: picture(**SMALL),
            "num_frames": 9,
        },
        batch=1,
    ),
    "cosmos25": Whole(
        pipeline="Cosmos2_5_PredictBasePipeline",
        vae="cosmos25",
        denoiser="CosmosTransformer3DModel",
        config={**COSMOS, "in_channels": 17},
        scheduler=part("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction"),
        names=GUARDED,
        call={**SMALL, **UNGUIDED, "prompt_embeds": lambda: text(1), "num_frames": 9},
        batch=1,
    ),
    "cosmos3": Whole(
        pipeline="Cosmos3OmniPipeline",
        vae="cosmos3",
        denoiser="Cosmos3OmniTransformer",
        config={
            "head_dim": 6,
            "hidden_size": 6,
            "intermediate_size": 12,
            "latent_channel": 48,
            "latent_patch_size": 2,
            "patch_latent_dim": 192,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "rope_axes_dim": [1, 1, 1],
            "vocab_size": 16,
        },
        scheduler=part("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction"),
        parts={"text_tokenizer": tokenizer},
        names=GUARDED,
        answers={"tokenize_prompt": lambda: ([1, 2, 3], [1])},
        call={**LARGE, **UNGUIDED, "prompt": "a fox", "num_frames": 5},
        batch=1,
    ),
}
