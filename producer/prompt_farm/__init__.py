"""The prompt farm: denoise and decode at the same time, restartably. Starts without torch; running one needs it.

>>> from producer.prompt_farm import Farm
>>> for result in Farm(pipe, client, ["a fox in the snow", "an old map"], out="pictures"):
...     print(result.prompt, result.file, result.error)
"""

from producer.prompt_farm.farm import AsyncFarm, Farm
from producer.prompt_farm.options import FarmOptions
from producer.prompt_farm.results import FarmResult
from producer.prompt_farm.rows import PromptRow, read_rows
from producer.prompt_farm.tally import Overlap, Tally

__all__ = [
    "AsyncFarm",
    "Farm",
    "FarmOptions",
    "FarmResult",
    "Overlap",
    "PromptRow",
    "Tally",
    "read_rows",
]
