"""Pictures by image VAEs other than AutoencoderKL, and by VAEs that stand in for a pipeline's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tests.parity.whole_pipelines import (
    CONDITIONED_BY_SIZE,
    FROM_WORDS,
    MASKED,
    PROMPT,
    SMALL,
    UNGUIDED,
    NoEncoder,
    Whole,
    mask,
    part,
    pooled,
    text,
)

_SD = Whole(
    pipeline="StableDiffusionPipeline",
    vae="sd-asymmetric",
    denoiser="UNet2DConditionModel",
    part="unet",
    scheduler=part("DDIMScheduler", steps_offset=1, clip_sample=False),
    parts={"requires_safety_checker": False},
    call=FROM_WORDS,
)
_SDXL = replace(
    _SD,
    pipeline="StableDiffusionXLPipeline",
    vae="sdxl-original",
    config=CONDITIONED_BY_SIZE,
    parts={"add_watermarker": False},
    call={**FROM_WORDS, "pooled_prompt_embeds": pooled},
    given={"vae": "sdxl-original"},
)

CASES: Mapping[str, Whole] = {
    "hunyuan-image": Whole(
        pipeline="HunyuanImagePipeline",
        vae="hunyuan-image",
        denoiser="HunyuanImageTransformer2DModel",
        config={"attention_head_dim": 8, "text_embed_2_dim": 8, "rope_axes_dim": [4, 4]},
        call={
            "height": 64,
            "width": 96,
            "prompt_embeds": text,
            "prompt_embeds_mask": mask,
            "prompt_embeds_2": text,
            "prompt_embeds_mask_2": mask,
            "negative_prompt_embeds": text,
            "negative_prompt_embeds_mask": mask,
            "negative_prompt_embeds_2": text,
            "negative_prompt_embeds_mask_2": mask,
        },
    ),
    "sana, a size that is no bin": Whole(
        pipeline="SanaPipeline",
        vae="sana",
        denoiser="SanaTransformer2DModel",
        scheduler=part("DPMSolverMultistepScheduler"),
        # 500 × 600 is decoded as 480 × 544, then resized and cropped
        call={**MASKED, **UNGUIDED, "height": 500, "width": 600},
        given={"height": 500, "width": 600},
    ),
    "sana-sprint": Whole(
        pipeline="SanaSprintPipeline",
        vae="sana-sprint",
        denoiser="SanaTransformer2DModel",
        config={"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        scheduler=part("SCMScheduler"),
        call={**MASKED, "height": 128, "width": 96, "use_resolution_binning": False},
    ),
    "dreamlite": Whole(
        pipeline="DreamLitePipeline",
        vae="dreamlite",
        denoiser="DreamLiteUNetModel",
        part="unet",
        parts={"text_encoder": NoEncoder},
        answers={"encode_prompt": lambda: (text(), mask())},  # of no prompt, and of the prompt
        call={"height": 64, "width": 96, "prompt": "a fox"},
        batch=1,
    ),
    "taesd": replace(_SD, vae="taesd", given={"vae": "taesd"}),
    "sd-asymmetric": _SD,
    "taesdxl": replace(_SDXL, vae="taesdxl", given={"vae": "taesdxl"}),
    "taef1": Whole(
        pipeline="FluxPipeline",
        vae="taef1",
        denoiser="FluxTransformer2DModel",
        call={**SMALL, **PROMPT, "pooled_prompt_embeds": pooled},
        given={"vae": "taef1", **SMALL},
    ),
    "sdxl-original": _SDXL,
    "playground": replace(_SDXL, vae="playground", scheduler=part("EDMDPMSolverMultistepScheduler"), given={}),
    "prx-dc, a size that is no bin": Whole(
        pipeline="PRXPipeline",
        vae="prx-dc",
        denoiser="PRXTransformer2DModel",
        config={"in_channels": 32, "patch_size": 1},
        parts={"default_sample_size": 256},
        call={**MASKED, **UNGUIDED, "height": 180, "width": 250},
        given={"height": 180, "width": 250},
    ),
}
