"""Families of pictures whose latents are (B, C, h, w) or nearly: a whole pipeline of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.parity.whole_pipelines import (
    COLUMNS,
    CONDITIONED_BY_SIZE,
    FROM_MASKED_WORDS,
    FROM_WORDS,
    MASKED,
    PROMPT,
    ROWS,
    SMALL,
    UNGUIDED,
    Whole,
    diffusers_class,
    ends,
    euler,
    mask,
    one_text,
    part,
    picture,
    pooled,
    text,
    tokenizer,
)


def _words_only(tokenizer: Any, max_image_size: int) -> Any:
    """OmniGen's processor without what it takes from torchvision to read pictures."""
    kind = diffusers_class("pipelines.omnigen.processor_omnigen.OmniGenMultiModalProcessor")
    processor = kind.__new__(kind)
    collator = diffusers_class("pipelines.omnigen.processor_omnigen.OmniGenCollator")
    processor.__dict__ |= {"text_tokenizer": tokenizer, "max_image_size": max_image_size, "collator": collator()}
    return processor


CASES: Mapping[str, Whole] = {
    "sd-x4-upscaler": Whole(
        pipeline="StableDiffusionUpscalePipeline",
        vae="sd-x4-upscaler",
        denoiser="UNet2DConditionModel",
        config={"in_channels": 7, "num_class_embeds": 400},
        part="unet",
        scheduler=part("DDIMScheduler"),
        parts={"low_res_scheduler": part("DDPMScheduler")},
        call={
            **PROMPT,
            **UNGUIDED,
            "image": lambda: [picture(height=ROWS, width=COLUMNS)] * 2,
        },
    ),
    "kolors": Whole(
        pipeline="pipelines.kolors.pipeline_kolors.KolorsPipeline",
        vae="kolors",
        denoiser="UNet2DConditionModel",
        config=CONDITIONED_BY_SIZE,
        part="unet",
        scheduler=part("DDIMScheduler"),
        call={**FROM_WORDS, "pooled_prompt_embeds": pooled},
    ),
    "pixart-alpha, a size that is no bin": Whole(
        pipeline="PixArtAlphaPipeline",
        vae="pixart-alpha",
        denoiser="PixArtTransformer2DModel",
        config={"sample_size": 32},
        scheduler=part("DPMSolverMultistepScheduler"),
        call={**MASKED, **UNGUIDED, "height": 180, "width": 250},
        given={"height": 180, "width": 250},
    ),
    "pixart-sigma": Whole(
        pipeline="PixArtSigmaPipeline",
        vae="pixart-sigma",
        denoiser="PixArtTransformer2DModel",
        config={"sample_size": 8},
        scheduler=part("DPMSolverMultistepScheduler"),
        call={**FROM_MASKED_WORDS, "use_resolution_binning": False},
    ),
    "hunyuandit": Whole(
        pipeline="HunyuanDiTPipeline",
        vae="hunyuandit",
        denoiser="HunyuanDiT2DModel",
        scheduler=part("DDPMScheduler"),
        parts={"requires_safety_checker": False},
        call={
            **SMALL,
            **MASKED,
            **UNGUIDED,
            "prompt_embeds_2": text,
            "prompt_attention_mask_2": mask,
            "use_resolution_binning": False,
        },
    ),
    "auraflow": Whole(
        pipeline="AuraFlowPipeline",
        vae="auraflow",
        denoiser="AuraFlowTransformer2DModel",
        call=FROM_MASKED_WORDS,
    ),
    "lumina": Whole(
        pipeline="LuminaPipeline",
        vae="lumina",
        denoiser="LuminaNextDiT2DModel",
        call=FROM_MASKED_WORDS,
    ),
    "omnigen": Whole(
        pipeline="OmniGenPipeline",
        vae="omnigen",
        denoiser="OmniGenTransformer2DModel",
        scheduler=euler(invert_sigmas=True, num_train_timesteps=1),
        parts={"tokenizer": tokenizer},
        names={"OmniGenMultiModalProcessor": _words_only},
        call={**SMALL, "prompt": ["a fox", "a hen"], "guidance_scale": 2.0},
    ),
    "sd3": Whole(
        pipeline="StableDiffusion3Pipeline",
        vae="sd3",
        denoiser="SD3Transformer2DModel",
        call={**SMALL, **PROMPT, "pooled_prompt_embeds": pooled, "guidance_scale": 0.0},
    ),
    "cogview3": Whole(
        pipeline="CogView3PlusPipeline",
        vae="cogview3",
        denoiser="CogView3PlusTransformer2DModel",
        scheduler=part("CogVideoXDDIMScheduler"),
        call=FROM_WORDS,
    ),
    "cogview4": Whole(
        pipeline="CogView4Pipeline",
        vae="cogview4",
        denoiser="CogView4Transformer2DModel",
        call={**SMALL, "prompt_embeds": lambda: text(length=16), **UNGUIDED},
    ),
    "lumina2": Whole(
        pipeline="Lumina2Pipeline",
        vae="lumina2",
        denoiser="Lumina2Transformer2DModel",
        call=FROM_MASKED_WORDS,
    ),
    "hidream": Whole(
        pipeline="HiDreamImagePipeline",
        vae="hidream",
        denoiser="HiDreamImageTransformer2DModel",
        call={
            **SMALL,
            **UNGUIDED,
            "prompt_embeds_t5": text,
            "prompt_embeds_llama3": lambda: text()[None].repeat(2, 1, 1, 1),
            "pooled_prompt_embeds": pooled,
        },
        sizes={"default_sample_size": 8},
    ),
    "z-image": Whole(
        pipeline="ZImagePipeline",
        vae="z-image",
        denoiser="ZImageTransformer2DModel",
        call={**SMALL, "prompt_embeds": lambda: list(text()), "guidance_scale": 0.0},
    ),
    "prx": Whole(
        pipeline="PRXPipeline",
        vae="prx",
        denoiser="PRXTransformer2DModel",
        call={**FROM_MASKED_WORDS, "use_resolution_binning": False},
    ),
    "glm-image": Whole(
        pipeline="GlmImagePipeline",
        vae="glm-image",
        denoiser="GlmImageTransformer2DModel",
        call={
            "height": 64,
            "width": 96,
            **PROMPT,
            **UNGUIDED,
            "prior_token_ids": lambda: mask(length=4 * 6),
        },
    ),
    "kandinsky5-image": Whole(
        pipeline="Kandinsky5T2IPipeline",
        vae="kandinsky5-image",
        denoiser="Kandinsky5Transformer3DModel",
        call={
            **SMALL,
            **UNGUIDED,
            "prompt_embeds_qwen": text,
            "prompt_embeds_clip": pooled,
            "prompt_cu_seqlens": ends,
        },
        sizes={"resolutions": [(SMALL["width"], SMALL["height"])]},
    ),
    "kandinsky5-image, one picture": Whole(  # whose strides are taken for another order than those of two
        pipeline="Kandinsky5T2IPipeline",
        vae="kandinsky5-image",
        denoiser="Kandinsky5Transformer3DModel",
        call={
            **SMALL,
            **UNGUIDED,
            "prompt_embeds_qwen": one_text,
            "prompt_embeds_clip": lambda: pooled()[:1],
            "prompt_cu_seqlens": lambda: ends()[:2],
        },
        sizes={"resolutions": [(SMALL["width"], SMALL["height"])]},
        batch=1,
    ),
}
