"""Tiny random text-to-image pipelines of real classes, in the latent space of the demo VAE or of SD's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

#: Side of a picture that a pipeline makes by itself.
SIDE_PX = 64


def tiny_pipeline(*, channels: int = 16, width: int = 8, seed: int = 0) -> Any:
    """A StableDiffusionPipeline without VAE that takes milliseconds for a step."""
    return _pipeline(
        StableDiffusionPipeline,
        UNet2DConditionModel,
        levels="2D",
        channels=channels,
        width=width,
        seed=seed,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def text_to_video() -> Any:
    """A TextToVideoSDPipeline without VAE, of SD's four channels."""
    return _pipeline(TextToVideoSDPipeline, UNet3DConditionModel, levels="3D", channels=4, width=8, seed=0)


def _pipeline(kind: Any, unet_class: Any, *, levels: str, channels: int, width: int, seed: int, **parts: object) -> Any:
    torch.manual_seed(seed)
    unet = unet_class(
        sample_size=SIDE_PX // 8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=(f"DownBlock{levels}", f"CrossAttnDownBlock{levels}"),
        up_block_types=(f"CrossAttnUpBlock{levels}", f"UpBlock{levels}"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler_class: Any = DDIMScheduler
    return kind(
        vae=None,
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=scheduler_class(clip_sample=False, steps_offset=1),
        **parts,
    )


def save_tiny_pipeline(folder: Path, **options: Any) -> Path:
    """The same, saved in diffusers' format."""
    tiny_pipeline(**options).save_pretrained(folder)
    return folder


def rename_class(folder: Path, name: str) -> None:
    """Makes the folder one of another pipeline class."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["_class_name"] = name
    path.write_text(json.dumps(index))


def _text_encoder() -> Any:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _tokenizer() -> Any:
    """A tokenizer of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters[:24], *(f"{letter}</w>" for letter in letters[:36])]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=16, unk_token="<|endoftext|>")
