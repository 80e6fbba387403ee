"""Older whole pipelines with a UNet: from words or pictures only, after an inversion, or with a net beside the UNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from tests.parity import tiny_clip
from tests.parity.others_of_unets import GUIDED, SD, SDXL
from tests.parity.variants import PICTURE, PICTURE_PAINTED, SIZES, one_pooled, variant
from tests.parity.whole_pipelines import (
    COLUMNS,
    CONDITIONED_BY_SIZE,
    ROWS,
    TINY,
    UNGUIDED,
    Whole,
    diffusers_class,
    part,
    picture,
    small_picture,
    text,
    tiny,
)

_EMBEDDED = ("prompt_embeds",)
_WORDS: Mapping[str, Any] = {"prompt": "a fox"}
_GUIDED_BY_WORDS: Mapping[str, Any] = {**_WORDS, "negative_prompt": "a hen", "guidance_scale": 3.0}
#: Whose constructor takes no checker.
_BARE = replace(SD, parts={})

# With a net of its own beside the UNet, or in it -------------------------------------------------------------

#: Its adapter wants two layers to a block.
_XS: Mapping[str, Any] = {"layers_per_block": 2}


def _adapter(**config: Any) -> Callable[[], Any]:
    """ControlNet-XS for a UNet of this config, half as wide."""
    return lambda: diffusers_class("ControlNetXSAdapter").from_unet(
        tiny("UNet2DConditionModel", **config), size_ratio=0.5, conditioning_embedding_out_channels=(4, 4, 4, 4)
    )


_GROUNDED: Mapping[str, Any] = {
    "gligen_phrases": ["a fox"],
    "gligen_boxes": [[0.1, 0.2, 0.6, 0.9]],
    "gligen_scheduled_sampling_beta": 1.0,  # in every step
}
_NET_CASES: Mapping[str, Whole] = {
    "StableDiffusionControlNetXS": variant(
        SD, "StableDiffusionControlNetXSPipeline", config=_XS, parts={"controlnet": _adapter(**_XS)}, call=PICTURE
    ),
    "StableDiffusionXLControlNetXS": variant(
        SDXL,
        "StableDiffusionXLControlNetXSPipeline",
        config={**CONDITIONED_BY_SIZE, **_XS},
        parts={"controlnet": _adapter(**CONDITIONED_BY_SIZE, **_XS)},
        call=PICTURE,
    ),
    "StableDiffusionGLIGEN": variant(
        SD,
        "StableDiffusionGLIGENPipeline",
        config={"attention_type": "gated"},
        parts=tiny_clip.READING,
        call=_GROUNDED,
    ),
    "StableDiffusionGLIGENTextImage": variant(
        SD,
        "StableDiffusionGLIGENTextImagePipeline",
        config={"attention_type": "gated-text-image"},
        parts={
            **tiny_clip.READING,
            "processor": tiny_clip.image_processor,
            "image_encoder": tiny_clip.image_encoder,
            "image_project": part("CLIPImageProjection", hidden_size=8),
        },
        call={**_GROUNDED, "gligen_images": lambda: [small_picture()]},
    ),
}

# From words or pictures only ---------------------------------------------------------------------------------

#: The other frames are made of the first one, once it is through two of four steps.
_FRAMES: Mapping[str, Any] = {"video_length": 3, "num_inference_steps": 4, "t0": 1, "t1": 2}
_IMAGE_UNET = replace(_BARE, part="image_unet")


def _text_unet() -> Any:
    """Versatile Diffusion's UNet for texts, of whose attention its pipelines make use."""
    kind = diffusers_class("pipelines.deprecated.versatile_diffusion.modeling_text_unet.UNetFlatConditionModel")
    blocks = {
        "down_block_types": ("CrossAttnDownBlockFlat", "DownBlockFlat"),
        "up_block_types": ("CrossAttnUpBlockFlat", "UpBlockFlat"),
    }
    return kind(**{**TINY["UNet2DConditionModel"], **blocks}).eval()


_VERSATILE_TEXT = {
    "tokenizer": tiny_clip.tokenizer,
    "text_encoder": tiny_clip.projecting_text_encoder,
    "text_unet": _text_unet,
}
_VERSATILE_IMAGE = {
    "image_feature_extractor": tiny_clip.image_processor,
    "image_encoder": tiny_clip.image_encoder,
}
_WORDS_CASES: Mapping[str, Whole] = {
    "SemanticStableDiffusion": variant(
        SD,
        "SemanticStableDiffusionPipeline",
        drop=_EMBEDDED,
        parts=tiny_clip.READING,
        call={**_GUIDED_BY_WORDS, "editing_prompt": "an owl", "edit_warmup_steps": 1},
    ),
    "StableUnCLIP": variant(
        _BARE,
        "StableUnCLIPPipeline",
        drop=_EMBEDDED,
        config={"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
        parts={
            **tiny_clip.READING,
            "prior_tokenizer": tiny_clip.tokenizer,
            "prior_text_encoder": tiny_clip.projecting_text_encoder,
            "prior": part(
                "PriorTransformer",
                num_attention_heads=2,
                attention_head_dim=4,
                num_layers=1,
                embedding_dim=8,
                num_embeddings=tiny_clip.LENGTH,
            ),
            "prior_scheduler": part("UnCLIPScheduler", prediction_type="sample"),
            "image_normalizer": part(
                "pipelines.stable_diffusion.stable_unclip_image_normalizer.StableUnCLIPImageNormalizer", embedding_dim=8
            ),
            "image_noising_scheduler": part("DDPMScheduler"),
        },
        call={**_GUIDED_BY_WORDS, "prior_num_inference_steps": 2},
    ),
    "TextToVideoZero": variant(
        SD,
        "TextToVideoZeroPipeline",
        drop=_EMBEDDED,
        parts=tiny_clip.READING,
        call={**_GUIDED_BY_WORDS, **_FRAMES},
        batch=3,
    ),
    "TextToVideoZeroSDXL": variant(
        SDXL,
        "TextToVideoZeroSDXLPipeline",
        call={**GUIDED, "prompt": None, "negative_pooled_prompt_embeds": one_pooled, **_FRAMES},
        batch=3,
    ),
    "VersatileDiffusionTextToImage": variant(
        _IMAGE_UNET,
        "VersatileDiffusionTextToImagePipeline",
        drop=_EMBEDDED,
        parts=_VERSATILE_TEXT,
        call=_GUIDED_BY_WORDS,
    ),
    "VersatileDiffusionImageVariation": variant(
        _IMAGE_UNET,
        "VersatileDiffusionImageVariationPipeline",
        drop=_EMBEDDED,
        parts=_VERSATILE_IMAGE,
        call={**PICTURE, "guidance_scale": 3.0},
    ),
    "VersatileDiffusionDualGuided": variant(
        _IMAGE_UNET,  # not made dual: DualTransformer2DModel lacks an argument that every block of a UNet hands it
        "VersatileDiffusionDualGuidedPipeline",
        drop=_EMBEDDED,
        parts={**_VERSATILE_TEXT, **_VERSATILE_IMAGE, "text_unet": None},
        call={**_WORDS, **PICTURE, "guidance_scale": 3.0},
    ),
    "PaintByExample": variant(
        SD,
        "PaintByExamplePipeline",
        drop=(*_EMBEDDED, *SIZES),
        config={"in_channels": 9},
        parts={"image_encoder": tiny_clip.example_encoder, "feature_extractor": tiny_clip.image_processor},
        call={**PICTURE_PAINTED, "example_image": small_picture, "guidance_scale": 3.0},
    ),
}

# Of a picture that is to be another --------------------------------------------------------------------------


def _inverted(pipeline: Any) -> None:
    """LEDITS++ edits the picture it inverted last."""
    pipeline.invert(
        image=picture(height=64, width=96),
        source_prompt="a fox",
        num_inversion_steps=3,
        generator=torch.Generator().manual_seed(5),
    )


_STOCHASTIC = part("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=2)
#: Attention at a quarter of the latents' size, which makes the mask of an edit.
_THREE_LEVELS: Mapping[str, Any] = {
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "block_out_channels": [4, 8, 8],
}
_EDIT: Mapping[str, Any] = {"editing_prompt": "a hen"}
_EDIT_CASES: Mapping[str, Whole] = {
    "CycleDiffusion": variant(
        SD,
        "CycleDiffusionPipeline",
        drop=(*_EMBEDDED, *SIZES),
        scheduler=part("DDIMScheduler", steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        parts=tiny_clip.READING,
        call={**PICTURE, **_WORDS, "source_prompt": "a hen", "guidance_scale": 3.0, "num_inference_steps": 4},
    ),
    "LEditsPPStableDiffusion": variant(
        SD,
        "LEditsPPPipelineStableDiffusion",
        drop=(*_EMBEDDED, *SIZES, *UNGUIDED),
        config=_THREE_LEVELS,
        scheduler=_STOCHASTIC,
        parts=tiny_clip.READING,
        first=_inverted,
        call=_EDIT,
    ),
    "LEditsPPStableDiffusionXL": variant(
        SDXL,
        "LEditsPPPipelineStableDiffusionXL",
        drop=(*_EMBEDDED, *SIZES, *UNGUIDED, "pooled_prompt_embeds"),
        scheduler=_STOCHASTIC,
        parts={"tokenizer_2": tiny_clip.tokenizer, "text_encoder_2": tiny_clip.projecting_text_encoder},
        first=_inverted,
        call=_EDIT,
    ),
    "StableDiffusionAttendAndExcite": variant(
        SD,
        "StableDiffusionAttendAndExcitePipeline",
        call={
            "prompt": None,
            "prompt_embeds": lambda: text(1, 5),
            "token_indices": [1, 2],
            "attn_res": (ROWS // 2, COLUMNS // 2),
        },
    ),
    "StableDiffusionDiffEdit": variant(
        SD,
        "StableDiffusionDiffEditPipeline",
        drop=SIZES,
        parts={"inverse_scheduler": part("DDIMInverseScheduler")},
        call={
            "mask_image": lambda: (text(1, ROWS, COLUMNS) > 0).float(),
            "image_latents": lambda: text(2 * 4, ROWS, COLUMNS).reshape(1, 2, 4, ROWS, COLUMNS),
            "inpaint_strength": 1.0,
        },
    ),
    "StableDiffusionInpaintLegacy": variant(
        SD, "StableDiffusionInpaintPipelineLegacy", drop=SIZES, call={**PICTURE_PAINTED, "strength": 0.99}
    ),
    "StableDiffusionModelEditing": variant(SD, "StableDiffusionModelEditingPipeline"),
    "StableDiffusionPix2PixZero": variant(
        SD,
        "StableDiffusionPix2PixZeroPipeline",
        call={**GUIDED, "source_embeds": text, "target_embeds": lambda: -text()},
    ),
}

CASES: Mapping[str, Whole] = {**_NET_CASES, **_WORDS_CASES, **_EDIT_CASES}
