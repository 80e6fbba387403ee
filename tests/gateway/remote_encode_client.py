"""Calls the installed diffusers' `remote_encode`, unmodified, for each case that standard input names.

Input: one JSON of `{"cases": [{"name", "url", "image", "arguments"}], "out": file}`; `image` is a PNG, or a torch file.
Output: a torch file with, for each case, the latents, or the exception's text.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from diffusers.utils.remote_utils import remote_encode
from PIL import Image


def main() -> None:
    job = json.load(sys.stdin)
    answers: dict[str, Any] = {}
    for case in job["cases"]:
        path = case["image"]
        image = torch.load(path, weights_only=True) if path.endswith(".pt") else Image.open(path)
        try:
            answers[case["name"]] = remote_encode(case["url"], image, **case["arguments"])
        except RuntimeError as error:
            answers[case["name"]] = f"RuntimeError: {error}"
    torch.save(answers, job["out"])


if __name__ == "__main__":
    main()
