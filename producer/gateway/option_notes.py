"""What each option of a job means, for the OpenAPI document: the `#:` lines of `DecodeOptions`, which have one text for
those who read the code and those who read the API.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

from producer.decode_options import DecodeOptions

_NOTE = re.compile(r"((?:    #: [^\n]*\n)+)    (\w+):")


def option_notes() -> Mapping[str, str]:
    """A sentence for each option; none where Python runs without its source."""
    try:
        source = inspect.getsource(DecodeOptions)
    except OSError:
        return {}
    return {name: _told(lines) for lines, name in _NOTE.findall(source)}


def _told(lines: str) -> str:
    """The note as someone sees it who leaves an option out where Python has None."""
    text = " ".join(line.strip().removeprefix("#: ") for line in lines.splitlines())
    text = re.sub(r"\bNone:", "left out:", text)
    return f"L{text[1:]}" if text.startswith("left out:") else text
