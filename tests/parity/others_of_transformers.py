"""Other whole pipelines of the families of pictures with a transformer: from a picture, with a control net …"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tests.parity import families_of_other_vaes, families_of_pictures, families_of_tokens
from tests.parity.variants import (
    CONTROLLED,
    PICTURE,
    PICTURE_CHANGED,
    PICTURE_PAINTED,
    SIZES,
    holes,
    one_pooled,
    variant,
)
from tests.parity.whole_pipelines import (
    SMALL,
    Whole,
    ends,
    mask,
    one_text,
    picture,
    small_picture,
    text,
    tiny,
)

#: Not a megapixel.
_SAME_SIZE = {"calculate_dimensions": lambda area, ratio: (SMALL["width"], SMALL["height"], None)}
_SAME_PAIR = {"calculate_dimensions": lambda area, ratio: (SMALL["width"], SMALL["height"])}


class _Processor:
    """LongCat-Image reads its picture with what its processor has."""

    image_processor = None


def _net(kind: str, **config: Any) -> Mapping[str, Callable[[], Any]]:
    return {"controlnet": lambda: tiny(kind, **config)}


_FLUX = Whole(
    pipeline="FluxPipeline",
    vae="flux",
    denoiser="FluxTransformer2DModel",
    call={**SMALL, "prompt_embeds": one_text, "pooled_prompt_embeds": one_pooled},
    given=SMALL,
    batch=1,
)
_FLUX_NET = _net("FluxControlNetModel")
_CONTROL_CHANNELS = {"in_channels": 128, "out_channels": 64}
_FLUX_CASES: Mapping[str, Whole] = {
    "FluxImg2Img": variant(_FLUX, "FluxImg2ImgPipeline", call=PICTURE_CHANGED),
    "FluxInpaint": variant(_FLUX, "FluxInpaintPipeline", call={**PICTURE_PAINTED, "strength": 0.99}),
    "FluxKontext": variant(
        _FLUX,
        "FluxKontextPipeline",
        call={**PICTURE, "_auto_resize": False, "max_area": SMALL["height"] * SMALL["width"]},
    ),
    "FluxKontextInpaint": variant(
        _FLUX,
        "FluxKontextInpaintPipeline",
        call={**PICTURE_PAINTED, "_auto_resize": False, "max_area": SMALL["height"] * SMALL["width"]},
    ),
    "FluxFill": variant(
        _FLUX, "FluxFillPipeline", config={"in_channels": 384, "out_channels": 64}, call=PICTURE_PAINTED
    ),
    "FluxControl": variant(_FLUX, "FluxControlPipeline", config=_CONTROL_CHANNELS, call=CONTROLLED),
    "FluxControlImg2Img": variant(
        _FLUX, "FluxControlImg2ImgPipeline", config=_CONTROL_CHANNELS, call={**PICTURE_CHANGED, **CONTROLLED}
    ),
    "FluxControlInpaint": variant(
        _FLUX,
        "FluxControlInpaintPipeline",
        config=_CONTROL_CHANNELS,
        call={**PICTURE_PAINTED, **CONTROLLED, "strength": 0.99},
    ),
    "FluxControlNet": variant(_FLUX, "FluxControlNetPipeline", parts=_FLUX_NET, call=CONTROLLED),
    "FluxControlNetImg2Img": variant(
        _FLUX, "FluxControlNetImg2ImgPipeline", parts=_FLUX_NET, call={**PICTURE_CHANGED, **CONTROLLED}
    ),
    "FluxControlNetInpaint": variant(
        _FLUX,
        "FluxControlNetInpaintPipeline",
        parts=_FLUX_NET,
        call={**PICTURE_PAINTED, **CONTROLLED, "strength": 0.99},
    ),
}

_SD3 = replace(
    families_of_pictures.CASES["sd3"],
    call={
        **SMALL,
        "guidance_scale": 0.0,
        "prompt_embeds": one_text,
        "pooled_prompt_embeds": one_pooled,
    },
    batch=1,
)
_SD3_GUIDED: Mapping[str, Any] = {
    "guidance_scale": 3.0,
    "negative_prompt_embeds": lambda: -one_text(),
    "negative_pooled_prompt_embeds": one_pooled,
}
_SD3_PAG = {"pag_applied_layers": ["blocks.0"]}
_SD3_CASES: Mapping[str, Whole] = {
    "StableDiffusion3Img2Img": variant(_SD3, "StableDiffusion3Img2ImgPipeline", call=PICTURE_CHANGED),
    "StableDiffusion3Inpaint": variant(
        _SD3, "StableDiffusion3InpaintPipeline", call={**PICTURE_PAINTED, "strength": 0.99}
    ),
    "StableDiffusion3ControlNet": variant(
        _SD3, "StableDiffusion3ControlNetPipeline", parts=_net("SD3ControlNetModel"), call=CONTROLLED
    ),
    "StableDiffusion3ControlNetInpainting": variant(
        _SD3,
        "StableDiffusion3ControlNetInpaintingPipeline",
        parts=_net("SD3ControlNetModel", extra_conditioning_channels=1),
        call={**CONTROLLED, "control_mask": holes},
    ),
    "StableDiffusion3PAG": variant(_SD3, "StableDiffusion3PAGPipeline", parts=_SD3_PAG, call=_SD3_GUIDED),
    "StableDiffusion3PAGImg2Img": variant(
        _SD3, "StableDiffusion3PAGImg2ImgPipeline", parts=_SD3_PAG, call={**_SD3_GUIDED, **PICTURE_CHANGED}
    ),
}

_Z = replace(
    families_of_pictures.CASES["z-image"],
    call={**SMALL, "prompt_embeds": lambda: list(one_text()), "guidance_scale": 0.0},
    batch=1,
)
_Z_CASES: Mapping[str, Whole] = {
    "ZImageOmni": variant(
        _Z,
        "ZImageOmniPipeline",
        parts={"siglip": None, "siglip_processor": None},
        call={"prompt_embeds": lambda: [[one_text()[0]]]},
    ),
    "ZImageImg2Img": variant(_Z, "ZImageImg2ImgPipeline", call=PICTURE_CHANGED),
    "ZImageInpaint": variant(_Z, "ZImageInpaintPipeline", call={**PICTURE_PAINTED, "strength": 0.99}),
    "ZImageControlNet": variant(_Z, "ZImageControlNetPipeline", parts=_net("ZImageControlNetModel"), call=CONTROLLED),
    "ZImageControlNetInpaint": variant(
        _Z,
        "ZImageControlNetInpaintPipeline",
        parts=_net("ZImageControlNetModel", control_in_dim=33),
        call={**PICTURE_PAINTED, **CONTROLLED},
    ),
}

_QWEN = replace(
    families_of_tokens.CASES["qwen-image"],
    call={
        **SMALL,
        "prompt_embeds": one_text,
        "prompt_embeds_mask": lambda: mask(1),
        "true_cfg_scale": 1.0,
    },
    batch=1,
)
_QWEN_NET = _net("QwenImageControlNetModel")
_QWEN_CASES: Mapping[str, Whole] = {
    "QwenImageImg2Img": variant(_QWEN, "QwenImageImg2ImgPipeline", call=PICTURE_CHANGED),
    "QwenImageInpaint": variant(_QWEN, "QwenImageInpaintPipeline", call={**PICTURE_PAINTED, "strength": 0.99}),
    "QwenImageEdit": variant(_QWEN, "QwenImageEditPipeline", names=_SAME_SIZE, call=PICTURE),
    "QwenImageEditInpaint": variant(
        _QWEN, "QwenImageEditInpaintPipeline", names=_SAME_SIZE, call={**PICTURE_PAINTED, "strength": 0.99}
    ),
    "QwenImageEditPlus": variant(
        _QWEN,
        "QwenImageEditPlusPipeline",
        names=_SAME_PAIR,
        call={"image": lambda: [small_picture()] * 2},
    ),
    "QwenImageControlNet": variant(_QWEN, "QwenImageControlNetPipeline", parts=_QWEN_NET, call=CONTROLLED),
    "QwenImageControlNetInpaint": variant(
        _QWEN,
        "QwenImageControlNetInpaintPipeline",
        parts=_net("QwenImageControlNetModel", extra_condition_channels=4),
        call={**CONTROLLED, "control_mask": holes},
    ),
}

_CHROMA = replace(
    families_of_tokens.CASES["chroma"],
    call={
        **SMALL,
        "guidance_scale": 0.0,
        "prompt_embeds": one_text,
        "prompt_attention_mask": lambda: mask(1).bool(),
    },
    batch=1,
)
_OTHER_CASES: Mapping[str, Whole] = {
    "ChromaImg2Img": variant(_CHROMA, "ChromaImg2ImgPipeline", call=PICTURE_CHANGED),
    "CogView4Control": variant(
        families_of_pictures.CASES["cogview4"],
        "CogView4ControlPipeline",
        config={"in_channels": 32, "out_channels": 16},
        call={**CONTROLLED, "prompt_embeds": lambda: text(1, length=16)},
        batch=1,
    ),
    "LongCatImageEdit": variant(
        families_of_tokens.CASES["longcat-image"],
        "LongCatImageEditPipeline",
        drop=(*SIZES, "enable_prompt_rewrite"),
        parts={"text_processor": _Processor},
        names=_SAME_PAIR,
        answers={"encode_prompt": lambda: (one_text(), text(1, 3, 3)[0])},
        call={**PICTURE, "prompt": "a fox"},
        batch=1,
    ),
    "Kandinsky5I2I": variant(
        families_of_pictures.CASES["kandinsky5-image"],
        "Kandinsky5I2IPipeline",
        config={"visual_cond": True},
        call={
            **PICTURE,
            "prompt_embeds_qwen": one_text,
            "prompt_embeds_clip": one_pooled,
            "prompt_cu_seqlens": lambda: ends()[:2],
        },
        batch=1,
    ),
    "PixArtSigmaPAG": variant(
        families_of_pictures.CASES["pixart-sigma"],
        "PixArtSigmaPAGPipeline",
        parts={"pag_applied_layers": ["blocks.0"]},
        drop=("prompt_attention_mask",),
        call={"prompt_attention_mask": mask},
    ),
    "HunyuanDiTPAG": variant(
        families_of_pictures.CASES["hunyuandit"],
        "HunyuanDiTPAGPipeline",
        call={
            "guidance_scale": 3.0,
            "negative_prompt_embeds": lambda: -text(),
            "negative_prompt_attention_mask": mask,
            "negative_prompt_embeds_2": lambda: -text(),
            "negative_prompt_attention_mask_2": mask,
        },
    ),
    "HunyuanDiTControlNet": variant(
        families_of_pictures.CASES["hunyuandit"],
        "HunyuanDiTControlNetPipeline",
        parts=_net("HunyuanDiT2DControlNetModel"),
        call=CONTROLLED,
    ),
    "SanaPAG": variant(
        families_of_other_vaes.CASES["sana, a size that is no bin"],
        "SanaPAGPipeline",
        call={"height": 128, "width": 96, "use_resolution_binning": False},
        given={},
    ),
    "SanaControlNet": variant(
        families_of_other_vaes.CASES["sana, a size that is no bin"],
        "SanaControlNetPipeline",
        parts=_net("SanaControlNetModel"),
        call={
            "height": 128,
            "width": 96,
            "use_resolution_binning": False,
            "control_image": lambda: picture(height=128, width=96),
        },
        given={},
    ),
    "SanaSprintImg2Img": variant(
        families_of_other_vaes.CASES["sana-sprint"],
        "SanaSprintImg2ImgPipeline",
        call={"image": lambda: picture(height=128, width=96), "strength": 0.99},
    ),
    "DreamLiteMobile": variant(
        families_of_other_vaes.CASES["dreamlite"],
        "DreamLiteMobilePipeline",
        answers={"encode_prompt": lambda: (one_text(), mask(1))},
    ),
    "Flux2KleinInpaint": variant(
        families_of_tokens.CASES["flux2-klein"],
        "Flux2KleinInpaintPipeline",
        call={**PICTURE_PAINTED, "strength": 0.99, "prompt_embeds": one_text},
        batch=1,
    ),
    "Flux2KleinKV": variant(families_of_tokens.CASES["flux2-klein"], "Flux2KleinKVPipeline"),
    "BriaFiboEdit": variant(
        families_of_tokens.CASES["bria-fibo"],
        "BriaFiboEditPipeline",
        call={
            "image": lambda: picture(height=96, width=128),
            "prompt": '{"edit_instruction": "a fox"}',
            "_auto_resize": False,
        },
    ),
}

CASES: Mapping[str, Whole] = {**_FLUX_CASES, **_SD3_CASES, **_Z_CASES, **_QWEN_CASES, **_OTHER_CASES}
