"""Options of a run, in code and on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from broker_config.errors import InvalidOption
from broker_config.keys import Priority
from broker_config.messages import Mode
from broker_config.settings import Settings
from producer.decode_options import DecodeOptions
from producer.prompt_farm.naming import DEFAULT_TEMPLATE
from producer.prompt_farm.rows import ROW_FIELDS, checked_row
from producer.webhook_option import checked_webhook

#: Of a row, what a run may say for all of them.
DEFAULTS: Final = tuple(name for name in ROW_FIELDS if name not in ("prompt", "seed"))


@dataclass(frozen=True, kw_only=True, slots=True)
class FarmOptions:
    """What a run does with its prompts."""

    #: Catalogue entry to decode with; None: the pipeline's.
    vae: str | None = None
    #: png, jpg, webp, mp4, tensor, uint8; None: png for pictures, mp4 for clips.
    output: str | None = None
    #: exact or fast; None: the worker's default.
    mode: str | None = None
    #: high, normal or low.
    priority: str = Priority.NORMAL
    #: Called by latentq when a job ended.
    webhook: str | None = None
    images_per_prompt: int = 1
    #: Prompts in one call of the pipeline.
    batch_size: int = 1
    #: Seeds of rows without one are made of it.
    seed: int = 0
    #: Of file names.
    name_template: str = DEFAULT_TEMPLATE
    #: For rows that say nothing themselves: negative_prompt, height, width, steps, guidance, num_frames.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    #: Results that may be under way before denoising waits.
    max_ahead: int = 256
    #: Whether the broker keeps results, until their retention ends, that are safe here.
    keep: bool = False
    #: How long a submit waits for a full queue before its latents go to the spool, seconds.
    block_s: float = 60.0

    def __post_init__(self) -> None:
        """Raises:
        InvalidOption: a value that is not allowed.
        """
        for name in ("images_per_prompt", "batch_size", "max_ahead"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidOption(f"{name} is {value!r}, expected a whole number above 0", field=name)
        for name, kind in (("mode", Mode), ("priority", Priority)):
            value = getattr(self, name)
            if value is not None and value not in set(kind):
                raise InvalidOption(f"{name} is {value!r}, expected one of {', '.join(kind)}", field=name)
        unknown = sorted(set(self.defaults) - set(DEFAULTS))
        if unknown:
            raise InvalidOption(
                f"{unknown[0]} is no default of a row; there are {', '.join(DEFAULTS)}", field="defaults"
            )
        checked_row({"prompt": "any", **self.defaults}, name="defaults", line=0)

    def check(self, settings: Settings) -> None:
        """What only the settings tell.

        Raises:
            InvalidJob: one of its subclasses: the webhook cannot be called.
        """
        checked_webhook(DecodeOptions(vae=self.vae or "", webhook=self.webhook), settings)

    def of_submits(self, output: str) -> dict[str, Any]:
        """Options of every submit."""
        values = {"output": output, "mode": self.mode, "priority": self.priority, "webhook": self.webhook}
        return {name: value for name, value in values.items() if value is not None} | {"block_s": self.block_s}
