"""Configs of tiny denoisers that serve several families: diffusers' own classes with one or two narrow layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tests.parity.whole_pipelines import TEXT

#: UNet2DConditionModel of Stable Diffusion, and as SDXL conditions it.
UNET: Final[Mapping[str, Any]] = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}
UNET_XL: Final[Mapping[str, Any]] = {
    **UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT,
}
#: CosmosTransformer3DModel.
COSMOS: Final[Mapping[str, Any]] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "mlp_ratio": 2,
    "text_embed_dim": TEXT,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "extra_pos_embed_type": None,
    "concat_padding_mask": False,  # resized by torchvision, which is no part of this
}
#: Kandinsky5Transformer3DModel and Kandinsky6Transformer3DModel.
KANDINSKY: Final[Mapping[str, Any]] = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "in_text_dim": TEXT,
    "in_text_dim2": TEXT,
    "time_dim": 16,
    "model_dim": 16,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (4, 2, 2),
}
