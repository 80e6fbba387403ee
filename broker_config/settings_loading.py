"""How every settings class is filled and how its errors read: one place for the shared, worker and gateway settings."""

from __future__ import annotations

import json
import re
from typing import Annotated, Final, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode

from broker_config.errors import ConfigurationError

__all__ = ["Names", "Ports", "load"]

S = TypeVar("S", bound=BaseSettings)

#: An IPv6 address in brackets: an entry, no list.
_ADDRESS: Final = re.compile(r"\s*\[[0-9a-fA-F]*:")


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("[") and not _ADDRESS.match(value):
        return tuple(json.loads(value))
    return tuple(part.strip() for part in value.split(",") if part.strip())


#: Names separated by commas, or a JSON list.
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
#: The same for ports.
Ports = Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], NoDecode, BeforeValidator(_split)]


def load(settings: type[S], what: str, overrides: dict[str, object]) -> S:
    """`settings` from its sources, with `overrides` on top; one that is None does not count.

    Raises:
        ConfigurationError: a value is not allowed; the message names each variable, and never its value.
    """
    given = {key: value for key, value in overrides.items() if value is not None or key[0] == "_"}
    try:
        return settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        prefix = settings.model_config.get("env_prefix", "")
        wrong = "; ".join(
            f"{prefix}{'_'.join(str(part) for part in item['loc']).upper() or '…'}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)
        )
        raise ConfigurationError(f"{what} are not usable: {wrong}") from None
