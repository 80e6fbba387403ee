"""Families of pictures whose latents are tokens or patches, or come from a video VAE: a whole pipeline of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from tests.parity.whole_pipelines import (
    COLUMNS,
    FROM_WORDS,
    GUARDED,
    LARGE,
    PROMPT,
    ROWS,
    SMALL,
    UNGUIDED,
    NoEncoder,
    Whole,
    diffusers_class,
    euler,
    mask,
    picture,
    small_picture,
    text,
    tiny,
)

_QWEN_PROMPT = {"prompt_embeds": text, "prompt_embeds_mask": mask}


class _NoProcessor:
    """Qwen-Image 2.1 counts the tokens of its template as it is made."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0, 1]]


def _ideogram_prompt() -> Any:
    ids = diffusers_class("Ideogram4Pipeline")._prepare_ids([3, 3], ROWS // 2, COLUMNS // 2, 3, torch.device("cpu"))
    return (text(length=3 + ROWS * COLUMNS // 4), *ids)


_BRIA_FIBO = Whole(
    pipeline="BriaFiboPipeline",
    vae="bria-fibo",
    denoiser="BriaFiboTransformer2DModel",
    config={"in_channels": 48},
    answers={
        "encode_prompt": lambda: (text(), None, torch.zeros(3, 3), mask(), None, [text(), text()], None),
    },
    call={**LARGE, **UNGUIDED, "prompt": ["a fox", "a hen"]},
    given=LARGE,
)

CASES: Mapping[str, Whole] = {
    "chroma": Whole(
        pipeline="ChromaPipeline",
        vae="chroma",
        denoiser="ChromaTransformer2DModel",
        call={**SMALL, **PROMPT, "prompt_attention_mask": lambda: mask().bool(), "guidance_scale": 0.0},
        given=SMALL,
    ),
    "bria": Whole(
        pipeline="BriaPipeline",
        vae="bria",
        denoiser="BriaTransformer2DModel",
        call=FROM_WORDS,
        given=SMALL,
    ),
    "longcat-image": Whole(
        pipeline="LongCatImagePipeline",
        vae="longcat-image",
        denoiser="LongCatImageTransformer2DModel",
        answers={"_encode_prompt": text},
        call={**SMALL, **UNGUIDED, "prompt": ["a fox", "a hen"], "enable_prompt_rewrite": False},
        given=SMALL,
    ),
    "ovis-image": Whole(
        pipeline="OvisImagePipeline",
        vae="ovis-image",
        denoiser="OvisImageTransformer2DModel",
        call=FROM_WORDS,
        given=SMALL,
    ),
    "flux2": Whole(
        pipeline="Flux2Pipeline",
        vae="flux2",
        denoiser="Flux2Transformer2DModel",
        call={**SMALL, **PROMPT},
        given=SMALL,
    ),
    "flux2-klein": Whole(
        pipeline="Flux2KleinPipeline",
        vae="flux2-klein",
        denoiser="Flux2Transformer2DModel",
        config={"guidance_embeds": False},
        parts={"is_distilled": True},
        call={**SMALL, **PROMPT},
    ),
    "ernie-image": Whole(
        pipeline="ErnieImagePipeline",
        vae="ernie-image",
        denoiser="ErnieImageTransformer2DModel",
        call={**SMALL, "prompt_embeds": lambda: list(text()), **UNGUIDED},
    ),
    "bria-fibo2": Whole(
        pipeline="BriaFibo2Pipeline",
        vae="bria-fibo2",
        denoiser="BriaFibo2Transformer2DModel",
        call={
            **SMALL,
            **UNGUIDED,
            "prompt_embeds": lambda: text()[:, None].repeat(1, 2, 1, 1),  # a bundle for the gist, one for layer 0
            "prompt_embeds_mask": mask,
        },
    ),
    "ideogram4": Whole(
        pipeline="Ideogram4Pipeline",
        vae="ideogram4",
        denoiser="Ideogram4Transformer2DModel",
        parts={
            "unconditional_transformer": lambda: tiny("Ideogram4Transformer2DModel"),
        },
        answers={"encode_prompt": _ideogram_prompt},
        call={
            **SMALL,
            "prompt": ["a fox", "a hen"],
            "guidance_scale": 3.0,
            "guidance_schedule": None,
            "max_sequence_length": 3,
        },
        given=SMALL,
    ),
    "hunyuan-image-refiner": Whole(
        pipeline="HunyuanImageRefinerPipeline",
        vae="hunyuan-image-refiner",
        denoiser="HunyuanImageTransformer2DModel",
        config={
            "in_channels": 128,
            "out_channels": 64,
            "attention_head_dim": 16,
            "patch_size": [1, 1, 1],
            "rope_axes_dim": [4, 6, 6],
            "guidance_embeds": True,
        },
        call={
            **LARGE,
            **_QWEN_PROMPT,
            "image": lambda: picture(**LARGE),
        },
    ),
    "qwen-image": Whole(
        pipeline="QwenImagePipeline",
        vae="qwen-image",
        denoiser="QwenImageTransformer2DModel",
        call={**SMALL, **_QWEN_PROMPT, "true_cfg_scale": 1.0},
        given=SMALL,
    ),
    "qwen-image-layered": Whole(
        pipeline="QwenImageLayeredPipeline",
        vae="qwen-image-layered",
        denoiser="QwenImageTransformer2DModel",
        config={"use_additional_t_cond": True, "use_layer3d_rope": True},
        parts={"text_encoder": NoEncoder},
        answers={"get_image_caption": lambda: ["a fox"], "encode_prompt": lambda: (text(1), mask(1))},
        call={"image": lambda: picture(height=96, width=128).convert("RGBA"), "layers": 2, "true_cfg_scale": 1.0},
        names={"calculate_dimensions": lambda area, ratio: (SMALL["width"], SMALL["height"])},  # 640 × 640 or more
        given={"layers": 2, **SMALL},
        batch=1,
        by_callback=True,  # pipeline_qwenimage_layered.py `__call__` names its latents otherwise than it returns them
    ),
    "qwen-image-21, RGBA": Whole(
        pipeline="QwenImage21Pipeline",
        vae="qwen-image-21",
        denoiser="QwenImage21Transformer2DModel",
        parts={"processor": _NoProcessor},
        call={**LARGE, "prompt_embeds": text, "prompt_embeds_mask": lambda: mask().bool(), "true_cfg_scale": 1.0},
        given=LARGE,
    ),
    "krea2": Whole(
        pipeline="Krea2Pipeline",
        vae="krea2",
        denoiser="Krea2Transformer2DModel",
        call={
            **SMALL,
            "prompt_embeds": lambda: text()[:, :, None],
            "prompt_embeds_mask": lambda: mask().bool(),
            "guidance_scale": 0.0,
        },
        given=SMALL,
    ),
    "nucleus-image": Whole(
        pipeline="NucleusMoEImagePipeline",
        vae="nucleus-image",
        denoiser="NucleusMoEImageTransformer2DModel",
        parts={"processor": None},
        call={**SMALL, **_QWEN_PROMPT, **UNGUIDED},
        given=SMALL,
    ),
    "bria-fibo": _BRIA_FIBO,
    "bria-fibo, patches": replace(
        _BRIA_FIBO,
        config={"in_channels": 192},
        call={**LARGE, **UNGUIDED, "prompt": ["a fox", "a hen"], "do_patching": True},
        given={**LARGE, "patch_size": 2},
    ),
    "joyimage": Whole(
        pipeline="JoyImageEditPipeline",
        vae="joyimage",
        denoiser="JoyImageEditTransformer3DModel",
        answers={
            "encode_prompt_multiple_images": lambda: (text(1), mask(1)),
            "vae_image_processor.get_default_height_width": lambda: tuple(SMALL.values()),
        },
        call={"image": small_picture, "prompt": "a fox", **UNGUIDED},
        rounds=True,  # decoded beside the picture it was made from, which is not handed out
        batch=1,
    ),
    "joyimage-plus": Whole(
        pipeline="JoyImageEditPlusPipeline",
        vae="joyimage-plus",
        denoiser="JoyImageEditPlusTransformer3DModel",
        answers={
            "encode_prompt_multiple_images": lambda: (text(), mask()),
            "image_processor.get_default_height_width": lambda: (32, 48),
        },
        call={
            **SMALL,
            **UNGUIDED,
            "prompt": ["a fox", "a hen"],
            "images": lambda: [[picture(height=64, width=96)]] * 2,
        },
        given=SMALL,
    ),
    "cosmos2-image": Whole(
        pipeline="Cosmos2TextToImagePipeline",
        vae="cosmos2-image",
        denoiser="CosmosTransformer3DModel",
        scheduler=euler(use_karras_sigmas=True),
        names=GUARDED,
        call=FROM_WORDS,
    ),
}
