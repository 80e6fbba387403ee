"""Other whole pipelines of the families with a UNet: from a picture, with a control net, or guided in another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tests.parity.variants import CONTROLLED, PICTURE, PICTURE_CHANGED, PICTURE_PAINTED, SIZES, one_pooled, variant
from tests.parity.whole_pipelines import (
    CONDITIONED_BY_SIZE,
    ROWS,
    SMALL,
    UNGUIDED,
    Whole,
    one_text,
    part,
    small_picture,
    text,
    tiny,
)


def _net(kind: str, **config: Any) -> Callable[[], Any]:
    return lambda: tiny(kind, **config)


SD = Whole(
    pipeline="StableDiffusionPipeline",
    vae="sd",
    denoiser="UNet2DConditionModel",
    part="unet",
    scheduler=part("DDIMScheduler", steps_offset=1, clip_sample=False),
    parts={"requires_safety_checker": False},
    call={**SMALL, **UNGUIDED, "prompt_embeds": one_text},
    batch=1,
)
_SD_NET = {"controlnet": _net("ControlNetModel")}
GUIDED: Mapping[str, Any] = {"guidance_scale": 3.0, "negative_prompt_embeds": lambda: -one_text()}

_SD_CASES: Mapping[str, Whole] = {
    "StableDiffusionImg2Img": variant(SD, "StableDiffusionImg2ImgPipeline", drop=SIZES, call=PICTURE_CHANGED),
    "StableDiffusionInpaint": variant(SD, "StableDiffusionInpaintPipeline", call=PICTURE_PAINTED),
    "StableDiffusionInpaint, nine channels": variant(
        SD, "StableDiffusionInpaintPipeline", config={"in_channels": 9}, call=PICTURE_PAINTED
    ),
    "StableDiffusionInstructPix2Pix": variant(
        SD,
        "StableDiffusionInstructPix2PixPipeline",
        drop=SIZES,
        config={"in_channels": 8},
        call={**PICTURE, **GUIDED},
    ),
    "StableDiffusionDepth2Img": variant(
        replace(SD, parts={}),
        "StableDiffusionDepth2ImgPipeline",
        drop=SIZES,
        config={"in_channels": 5},
        call={**PICTURE_CHANGED, "depth_map": lambda: text(1, SMALL["height"], SMALL["width"])},
    ),
    "StableDiffusionImageVariation": variant(
        SD,
        "StableDiffusionImageVariationPipeline",
        drop=("prompt_embeds",),
        answers={"_encode_image": lambda: text(1, 1)},
        call=PICTURE,
    ),
    "StableDiffusionLatentUpscale": variant(
        replace(SD, parts={}),
        "StableDiffusionLatentUpscalePipeline",
        drop=SIZES,
        scheduler=part("EulerDiscreteScheduler"),
        config={"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 128 + 8},
        call={"image": lambda: text(1, 4, 48).reshape(1, 4, ROWS, 8), "pooled_prompt_embeds": one_pooled},
    ),
    "StableDiffusionControlNet": variant(SD, "StableDiffusionControlNetPipeline", parts=_SD_NET, call=PICTURE),
    "StableDiffusionControlNetImg2Img": variant(
        SD, "StableDiffusionControlNetImg2ImgPipeline", parts=_SD_NET, call={**PICTURE_CHANGED, **CONTROLLED}
    ),
    "StableDiffusionControlNetInpaint": variant(
        SD, "StableDiffusionControlNetInpaintPipeline", parts=_SD_NET, call={**PICTURE_PAINTED, **CONTROLLED}
    ),
    "StableDiffusionControlNetPAG": variant(SD, "StableDiffusionControlNetPAGPipeline", parts=_SD_NET, call=PICTURE),
    "StableDiffusionControlNetPAGInpaint": variant(
        SD, "StableDiffusionControlNetPAGInpaintPipeline", parts=_SD_NET, call={**PICTURE_PAINTED, **CONTROLLED}
    ),
    "StableDiffusionPAG": variant(SD, "StableDiffusionPAGPipeline"),
    "StableDiffusionPAGImg2Img": variant(SD, "StableDiffusionPAGImg2ImgPipeline", drop=SIZES, call=PICTURE_CHANGED),
    "StableDiffusionPAGInpaint": variant(SD, "StableDiffusionPAGInpaintPipeline", call=PICTURE_PAINTED),
    "LatentConsistencyModel": variant(
        SD, "LatentConsistencyModelPipeline", config={"time_cond_proj_dim": 8}, scheduler=part("LCMScheduler")
    ),
    "LatentConsistencyModelImg2Img": variant(
        SD,
        "LatentConsistencyModelImg2ImgPipeline",
        drop=SIZES,
        config={"time_cond_proj_dim": 8},
        scheduler=part("LCMScheduler"),
        call={**PICTURE_CHANGED, "num_inference_steps": 2},
    ),
    "StableDiffusionAdapter": variant(
        SD,
        "StableDiffusionAdapterPipeline",
        parts={"adapter": part("T2IAdapter", channels=[4, 8], num_res_blocks=1, downscale_factor=8)},
        call=PICTURE,
    ),
    "StableDiffusionPanorama": variant(SD, "StableDiffusionPanoramaPipeline"),
    "StableDiffusionSAG": variant(SD, "StableDiffusionSAGPipeline", call={"sag_scale": 0.0}),
    "StableUnCLIPImg2Img": variant(
        replace(SD, parts={}),
        "StableUnCLIPImg2ImgPipeline",
        config={"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16},
        answers={"_encode_image": lambda: text(1, 1, 16)[:, 0]},
        call={"image_embeds": one_pooled},
        parts={
            "image_normalizer": part(
                "pipelines.stable_diffusion.stable_unclip_image_normalizer.StableUnCLIPImageNormalizer", embedding_dim=8
            ),
            "image_noising_scheduler": part("DDPMScheduler"),
            "image_encoder": None,
            "feature_extractor": None,
        },
    ),
    "AltDiffusion": variant(SD, "pipelines.deprecated.alt_diffusion.AltDiffusionPipeline"),
    "AltDiffusionImg2Img": variant(
        SD, "pipelines.deprecated.alt_diffusion.AltDiffusionImg2ImgPipeline", drop=SIZES, call=PICTURE_CHANGED
    ),
    "StableDiffusionParadigms": variant(
        SD, "StableDiffusionParadigmsPipeline", scheduler=part("DDIMParallelScheduler"), call={"parallel": 2}
    ),
}

SDXL = replace(
    SD,
    pipeline="StableDiffusionXLPipeline",
    vae="sdxl",
    config=CONDITIONED_BY_SIZE,
    parts={"add_watermarker": False},
    call={**SD.call, "pooled_prompt_embeds": one_pooled},
)
_SDXL_NET = {"controlnet": _net("ControlNetModel", **CONDITIONED_BY_SIZE)}
_UNION_NET = {"controlnet": _net("ControlNetUnionModel", **CONDITIONED_BY_SIZE)}
_UNION: Mapping[str, Any] = {"control_mode": [0]}

_SDXL_CASES: Mapping[str, Whole] = {
    "StableDiffusionXLImg2Img": variant(SDXL, "StableDiffusionXLImg2ImgPipeline", drop=SIZES, call=PICTURE_CHANGED),
    "StableDiffusionXLInpaint": variant(SDXL, "StableDiffusionXLInpaintPipeline", call=PICTURE_PAINTED),
    "StableDiffusionXLInstructPix2Pix": variant(
        SDXL,
        "StableDiffusionXLInstructPix2PixPipeline",
        config={**CONDITIONED_BY_SIZE, "in_channels": 8},
        call={**PICTURE, **GUIDED, "negative_pooled_prompt_embeds": one_pooled},
    ),
    "StableDiffusionXLControlNet": variant(SDXL, "StableDiffusionXLControlNetPipeline", parts=_SDXL_NET, call=PICTURE),
    "StableDiffusionXLControlNetImg2Img": variant(
        SDXL, "StableDiffusionXLControlNetImg2ImgPipeline", parts=_SDXL_NET, call={**PICTURE_CHANGED, **CONTROLLED}
    ),
    "StableDiffusionXLControlNetInpaint": variant(
        replace(SDXL, parts={}),
        "StableDiffusionXLControlNetInpaintPipeline",
        parts={**_SDXL_NET, "add_watermarker": False},
        call={**PICTURE_PAINTED, **CONTROLLED},
    ),
    "StableDiffusionXLControlNetUnion": variant(
        SDXL, "StableDiffusionXLControlNetUnionPipeline", parts=_UNION_NET, call={**CONTROLLED, **_UNION}
    ),
    "StableDiffusionXLControlNetUnionImg2Img": variant(
        SDXL,
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        parts=_UNION_NET,
        call={**PICTURE_CHANGED, **CONTROLLED, **_UNION},
    ),
    "StableDiffusionXLControlNetUnionInpaint": variant(
        SDXL,
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        parts=_UNION_NET,
        call={**PICTURE_PAINTED, "control_image": lambda: [small_picture()], **_UNION},
    ),
    "StableDiffusionXLControlNetPAG": variant(
        SDXL, "StableDiffusionXLControlNetPAGPipeline", parts=_SDXL_NET, call=PICTURE
    ),
    "StableDiffusionXLControlNetPAGImg2Img": variant(
        SDXL, "StableDiffusionXLControlNetPAGImg2ImgPipeline", parts=_SDXL_NET, call={**PICTURE_CHANGED, **CONTROLLED}
    ),
    "StableDiffusionXLPAG": variant(SDXL, "StableDiffusionXLPAGPipeline"),
    "StableDiffusionXLPAGImg2Img": variant(
        SDXL, "StableDiffusionXLPAGImg2ImgPipeline", drop=SIZES, call=PICTURE_CHANGED
    ),
    "StableDiffusionXLPAGInpaint": variant(SDXL, "StableDiffusionXLPAGInpaintPipeline", call=PICTURE_PAINTED),
    "StableDiffusionXLAdapter": variant(
        replace(SDXL, parts={}),
        "StableDiffusionXLAdapterPipeline",
        parts={"adapter": part("T2IAdapter", channels=[4, 8], num_res_blocks=1, downscale_factor=8)},
        call=PICTURE,
    ),
    "KolorsImg2Img": variant(
        replace(SDXL, vae="kolors", parts={}),
        "pipelines.kolors.pipeline_kolors_img2img.KolorsImg2ImgPipeline",
        drop=SIZES,
        answers={"encode_prompt": lambda: (one_text(), None, one_pooled(), None)},  # leaves pooled embeddings out
        call=PICTURE_CHANGED,
    ),
    "KolorsPAG": variant(replace(SDXL, vae="kolors", parts={}), "pipelines.pag.pipeline_pag_kolors.KolorsPAGPipeline"),
}

CASES: Mapping[str, Whole] = {**_SD_CASES, **_SDXL_CASES}
