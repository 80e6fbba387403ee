"""A CLIP of a layer or two: for the pipelines that take words or pictures only, and no embeddings in their place."""

from __future__ import annotations

import importlib
import string
from collections.abc import Callable, Mapping
from typing import Any, Final

from tests.parity.whole_pipelines import TEXT, diffusers_class

#: Tokens of a prompt, longer ones are cut: its beginning, its end, and six letters between.
LENGTH: Final = 8
#: Every letter, within a word and at its end.
_VOCABULARY: Final = (
    "<|startoftext|>",
    "<|endoftext|>",
    *string.ascii_lowercase,
    *(f"{letter}</w>" for letter in string.ascii_lowercase),
)
_LAYERS: Final[Mapping[str, Any]] = {
    "hidden_size": TEXT,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "projection_dim": TEXT,
}
_TEXT: Final[Mapping[str, Any]] = {
    **_LAYERS,
    "num_hidden_layers": 2,
    "vocab_size": len(_VOCABULARY),
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
#: Pixels of a side of what the image encoder sees, in four patches.
_SEEN: Final = 16
#: Of fewer layers than four, the encoder of Paint by Example would have no mapper.
_VISION: Final[Mapping[str, Any]] = {**_LAYERS, "num_hidden_layers": 4, "image_size": _SEEN, "patch_size": _SEEN // 2}


def _transformers(name: str) -> Any:
    """A class of transformers; late, since it takes seconds to import."""
    return getattr(importlib.import_module("transformers"), name)


def tokenizer() -> Any:
    """CLIP's, which knows letters only."""
    vocabulary = {token: number for number, token in enumerate(_VOCABULARY)}
    return _transformers("CLIPTokenizer")(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def text_encoder(kind: str = "CLIPTextModel") -> Any:
    """Of random weights."""
    return _transformers(kind)(_transformers("CLIPTextConfig")(**_TEXT)).eval()


def projecting_text_encoder() -> Any:
    """The same, with a projection of its pooled output."""
    return text_encoder("CLIPTextModelWithProjection")


def image_encoder() -> Any:
    """Of random weights."""
    return _transformers("CLIPVisionModelWithProjection")(_transformers("CLIPVisionConfig")(**_VISION)).eval()


def example_encoder() -> Any:
    """The image encoder of Paint by Example."""
    kind = diffusers_class("pipelines.deprecated.paint_by_example.PaintByExampleImageEncoder")
    return kind(_transformers("CLIPVisionConfig")(**_VISION)).eval()


def image_processor() -> Any:
    """Makes of a picture what the image encoder sees, by Pillow: torchvision is no part of this."""
    return _transformers("CLIPImageProcessorPil")(
        size={"shortest_edge": _SEEN}, crop_size={"height": _SEEN, "width": _SEEN}
    )


#: Parts of a pipeline that reads words, and of one that sees pictures.
READING: Final[Mapping[str, Callable[[], Any]]] = {"tokenizer": tokenizer, "text_encoder": text_encoder}
SEEING: Final[Mapping[str, Callable[[], Any]]] = {"feature_extractor": image_processor, "image_encoder": image_encoder}
