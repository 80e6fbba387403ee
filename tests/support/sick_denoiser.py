"""A denoiser without a pipeline that loses its device; `python -m tests.support.sick_denoiser` is a process with one.

The process loses its device at the prompt `lose`, the first time that one runs in the folder that `SCRIPTED_FOLDER`
names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from producer.prompt_farm import generator_process
from producer.prompt_farm.plan import Task
from tests.support.scripted_generator import FACTS

#: What torch says when a device is lost.
LOST = "CUDA error: an illegal memory access was encountered"


class SickDenoiser:
    """Takes prompts that begin with `bad` ill; after `lose`, its device is lost."""

    def __init__(self, *, mark: Path | None = None) -> None:
        """Args:
        mark: file that says that the device was lost before, and is sound now.
        """
        self.facts = FACTS
        self.options: dict[str, Any] = {"vae": "demo"}
        self.is_lost = False
        #: Prompts it was called with.
        self.asked: list[str] = []
        self._mark = mark

    def latents_of(self, tasks: Sequence[Task]) -> list[torch.Tensor]:
        """Latents in the demo VAE's space."""
        self.wait()
        for task in tasks:
            prompt = task.row.prompt
            self.asked.append(prompt)
            if prompt.startswith("bad"):
                raise ValueError(f"no {prompt}")
            if prompt == "lose" and (self._mark is None or not self._mark.exists()):
                if self._mark is not None:
                    self._mark.touch()
                self.is_lost = True
                self.wait()
            elif prompt == "lose":
                raise ValueError("no lose")
        return [torch.zeros(1, 16, 8, 8) for _ in tasks]

    def wait(self) -> None:
        """Raises once the device is lost, as every call does."""
        if self.is_lost:
            raise RuntimeError(LOST)


if __name__ == "__main__":
    denoiser: Any = SickDenoiser(mark=Path(os.environ["SCRIPTED_FOLDER"]) / "has-lost")
    generator_process._load = lambda asked, client: (denoiser, "sick")
    sys.exit(generator_process.main())
