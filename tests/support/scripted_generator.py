"""`python -m tests.support.scripted_generator`: a generator process without torch, which does what prompts tell it to.

`die` ends it with SIGKILL; `die once` too, unless it has done so before; `hold` waits for SIGTERM, and then ends as a
generator does that was told to end. Every other prompt is told of as failed, with the code `scripted`. With a file
`refuse` in the folder that `SCRIPTED_FOLDER` names, it cannot be loaded; each start adds a line to the file `starts`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from broker_config.errors import ConfigurationError
from producer.prompt_farm.events import Failed, to_wire
from producer.prompt_farm.facts import PipelineFacts
from producer.prompt_farm.plan import Task

FACTS = PipelineFacts(
    name="ScriptedPipeline", vae="demo", layout="unpacked", takes=("prompt",), height=64, width=64, num_frames=None
)


def _put(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _work(task: Task, folder: Path, stopping: threading.Event) -> None:
    prompt, mark = task.row.prompt, folder / "has-died"
    if prompt == "die" or (prompt == "die once" and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if prompt == "hold":
        (folder / "holding").write_text(str(os.getpid()))
        stopping.wait()
    _put(to_wire(Failed(task=task.job_id, stage="denoise", code="scripted", message=prompt)))


def main() -> int:
    """Runs until there is nothing left to do."""
    folder, stopping = Path(os.environ["SCRIPTED_FOLDER"]), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    sys.stdin.readline()
    if (folder / "refuse").exists():
        _put({"refused": ConfigurationError("the device has fallen off the bus", field="pipeline").to_wire()})
        return 2
    _put({"ready": {"facts": FACTS.to_wire(), "identity": "scripted", "seconds": 0.0}})
    sys.stdin.readline()
    for line in iter(sys.stdin.readline, ""):
        if stopping.is_set():
            break
        for item in json.loads(line):
            _work(Task.from_wire(item), folder, stopping)
        _put({"turn": True})
        if stopping.is_set():
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
