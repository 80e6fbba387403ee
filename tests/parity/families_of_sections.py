"""Families of clips that are decoded a section at a time: a whole pipeline of each."""

from __future__ import annotations

from collections.abc import Mapping

from tests.parity.whole_pipelines import (
    FROM_WORDS,
    SMALL,
    Whole,
    mask,
    one_text,
    small_picture,
    text,
)

CASES: Mapping[str, Whole] = {
    "helios": Whole(
        pipeline="HeliosPipeline",
        vae="helios",
        denoiser="HeliosTransformer3DModel",
        call={**FROM_WORDS, "num_frames": 17, "num_latent_frames_per_chunk": 3},
        given={"frames_per_call": 3},
    ),
    "hunyuanvideo, in sections": Whole(
        pipeline="HunyuanVideoFramepackPipeline",
        vae="hunyuanvideo",
        denoiser="HunyuanVideoFramepackTransformer3DModel",
        answers={"encode_image": one_text},
        call={
            **SMALL,
            "prompt_embeds": one_text,
            "pooled_prompt_embeds": lambda: text(1)[:, 0],
            "prompt_attention_mask": lambda: mask(1),
            "image": small_picture,
            "num_frames": 25,  # three sections
            "latent_window_size": 3,
        },
        given={"frames_per_call": 3},
        batch=1,
    ),
}
