"""Families of clips that are decoded a section at a time: a whole pipeline of each."""

from __future__ import annotations

from collections.abc import Mapping

from tests.parity.whole_pipelines import PROMPT, SMALL, TEXT, UNGUIDED, Whole, mask, picture, text

CASES: Mapping[str, Whole] = {
    "helios": Whole(
        pipeline="HeliosPipeline",
        vae="helios",
        denoiser="HeliosTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": TEXT,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 1,
            "rope_dim": (4, 4, 4),
        },
        call={**SMALL, **PROMPT, **UNGUIDED, "num_frames": 17, "num_latent_frames_per_chunk": 3},
        given={"frames_per_call": 3},
    ),
    "hunyuanvideo, in sections": Whole(
        pipeline="HunyuanVideoFramepackPipeline",
        vae="hunyuanvideo",
        denoiser="HunyuanVideoFramepackTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": TEXT,
            "pooled_projection_dim": TEXT,
            "rope_axes_dim": (2, 4, 4),
            "has_image_proj": True,
            "image_proj_dim": TEXT,
            "has_clean_x_embedder": True,
        },
        answers={"encode_image": lambda: text(1)},
        call={
            **SMALL,
            "prompt_embeds": lambda: text(1),
            "pooled_prompt_embeds": lambda: text(1)[:, 0],
            "prompt_attention_mask": lambda: mask(1),
            "image": lambda: picture(**SMALL),
            "num_frames": 25,  # three sections
            "latent_window_size": 3,
        },
        given={"frames_per_call": 3},
        batch=1,
    ),
}
