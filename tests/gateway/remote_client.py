"""Calls the installed diffusers' `remote_decode`, unmodified, for each case that standard input names.

Input: one JSON of `{"cases": [{"name", "url", "latents", "processor", "arguments"}], "out": file}`. Output: a torch
file with, for each case, what came back, or the exception's text.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode
from diffusers.video_processor import VideoProcessor
from PIL import Image

_PROCESSORS: dict[str, Any] = {
    "none": None,
    "image": VaeImageProcessor,
    "video": VideoProcessor,
}


def plain(value: Any) -> Any:
    """Pictures as arrays with their format; everything else as it is."""
    if isinstance(value, Image.Image):
        return {"pixels": torch.from_numpy(np.array(value)), "format": value.format}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def main() -> None:
    job = json.load(sys.stdin)
    answers: dict[str, Any] = {}
    for case in job["cases"]:
        processor = _PROCESSORS[case["processor"]]
        latents = torch.load(case["latents"], weights_only=True)
        try:
            answers[case["name"]] = plain(
                remote_decode(
                    case["url"],
                    latents,
                    processor=processor() if processor is not None else None,
                    **case["arguments"],
                )
            )
        except RuntimeError as error:
            answers[case["name"]] = f"RuntimeError: {error}"
    buffer = io.BytesIO()
    torch.save(answers, buffer)
    with open(job["out"], "wb") as file:
        file.write(buffer.getvalue())


if __name__ == "__main__":
    main()
