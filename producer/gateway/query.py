"""Query strings and JSON to options of a job: one converter for each type that `DecodeOptions` has.

Options are taken from the dataclass, so an option that is added there is taken here, too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from multidict import MultiMapping

from broker_config.errors import InvalidOption
from producer.decode_options import DecodeOptions

_TRUE: Final = ("true", "1")
_FALSE: Final = ("false", "0")
#: A seed has up to 64 bits.
_INT = re.compile(r"[+-]?\d{1,20}")


def _whole(text: str) -> int:
    if not _INT.fullmatch(text):
        raise ValueError
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _flag(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError
    return text.lower() in _TRUE


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _strings(text: str) -> dict[str, str]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


#: By the annotation of a field of `DecodeOptions`: what reads it, and what it is called in a message.
_READERS: Final[Mapping[str, tuple[Callable[[str], Any], str]]] = {
    "str": (str, "text"),
    "str | None": (str, "text"),
    "int | None": (_whole, "a whole number"),
    "float | None": (_number, "a number"),
    "bool": (_flag, "true or false"),
    "Sequence[str] | None": (_names, "names separated by commas"),
    "Mapping[str, str]": (_strings, "a JSON object of strings"),
}
#: Options of a job, by name, with the annotation of each.
OPTIONS: Final = {field.name: str(field.type) for field in dataclasses.fields(DecodeOptions)}


#: Options that no URL may have, since proxies and servers write URLs into their logs.
SECRET_OPTIONS: Final = frozenset({"webhook_secret"})


def read(name: str, text: str, reader: Callable[[str], Any], expected: str) -> Any:
    """`text` as `reader` understands it.

    Raises:
        InvalidOption: it does not.
    """
    try:
        return reader(text)
    except (ValueError, RecursionError):
        raise InvalidOption(f"{name} is {text[:80]!r}, expected {expected}", field=name) from None


def options_of(
    query: MultiMapping[str], *, besides: Iterable[str] = (), ignore_unknown: bool = False
) -> dict[str, Any]:
    """Options of a job in a query string.

    Args:
        query: the query.
        besides: parameters that are no options.
        ignore_unknown: other parameters are passed over.

    Raises:
        InvalidOption: unknown, given twice, or of the wrong type.
    """
    extra = set(besides)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(query):
        if name in extra:
            continue
        if name not in OPTIONS:
            if ignore_unknown:
                continue
            raise InvalidOption(f"{name[:80]!r} is not a parameter here; /docs has them", field=name[:80])
        if name in SECRET_OPTIONS:
            raise InvalidOption(
                f"{name} is in the URL, which others log: send it in the options of a multipart body, or store it with "
                "POST /v1/webhook-secrets",
                field=name,
            )
        values = query.getall(name)
        if len(values) > 1:
            raise InvalidOption(f"{name} is given {len(values)} times", field=name)
        reader, expected = _READERS[OPTIONS[name]]
        found[name] = read(name, values[0], reader, expected)
    return found


def options_of_json(value: object, *, besides: Iterable[str] = ()) -> dict[str, Any]:
    """Options of a job as a JSON object; checked further where every client's options are (`option_checks.py`).

    Raises:
        InvalidOption: not an object, or an unknown option.
    """
    if not isinstance(value, dict):
        raise InvalidOption("the options are not a JSON object", field="options")
    extra = set(besides)
    unknown = [name for name in value if name not in OPTIONS and name not in extra]
    if unknown:
        raise InvalidOption(f"{str(unknown[0])[:80]!r} is not an option; /docs has them", field=str(unknown[0])[:80])
    found = {name: item for name, item in value.items() if name in OPTIONS and item is not None}
    for name, item in found.items():
        if OPTIONS[name].startswith("str") and not isinstance(item, str):
            given = "not text" if name in SECRET_OPTIONS else f"{item!r:.80}"
            raise InvalidOption(f"{name} is {given}, expected text", field=name)
        if OPTIONS[name].startswith("Sequence") and not isinstance(item, list):
            raise InvalidOption(f"{name} is {item!r:.80}, expected a list", field=name)
    return found


def seconds(text: str) -> float:
    """Seconds of a wait, 0 or more."""
    number = _number(text)
    if number < 0:
        raise ValueError
    return number


def whole(text: str) -> int:
    """A whole number."""
    return _whole(text)


def only(query: MultiMapping[str], *names: str) -> None:
    """Raises `InvalidOption` if the query has others than these, or one of them twice."""
    for name in dict.fromkeys(query):
        if name not in names:
            raise InvalidOption(f"{name[:80]!r} is not a parameter here; /docs has them", field=name[:80])
        if len(query.getall(name)) > 1:
            raise InvalidOption(f"{name} is given more than once", field=name)
