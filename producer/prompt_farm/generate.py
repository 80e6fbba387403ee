"""`latentq generate`: a run with a generator process for each device, shown as it goes.

Everything that can be refused is refused before the first prompt is denoised: first what is cheap to check, then, once
the pipeline is loaded, what only it can tell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as StillLoading
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console

from broker_config.errors import ConfigurationError, InvalidOption
from producer.client import DecodeClient
from producer.prompt_farm.denoiser import check_class, class_in
from producer.prompt_farm.destination import MANIFEST_NAME, Destination, open_destination
from producer.prompt_farm.display import display_of, summary
from producer.prompt_farm.facts import check_output, check_tasks
from producer.prompt_farm.manifest import Manifest
from producer.prompt_farm.naming import NameTemplate
from producer.prompt_farm.options import FarmOptions
from producer.prompt_farm.plan import plan
from producer.prompt_farm.process_generator import ProcessGenerator, Ready
from producer.prompt_farm.rows import PromptRow, read_rows
from producer.prompt_farm.run import Run, settled

#: Name of the pipeline that ships with latentq.
DEMO_PIPELINE: Final = "latentq:demo"
_DEVICE: Final = re.compile(r"auto|cpu|mps|xpu(:\d+)?|cuda(:\d+)?")
_DTYPES: Final = ("float32", "float16", "bfloat16")
_INTERRUPTED: Final = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """What the command line asked for."""

    #: Repo, folder, or `latentq:demo`.
    pipeline: str
    #: File, or `-`.
    prompts: str
    #: Folder or `s3://bucket/prefix`.
    out: str
    options: FarmOptions
    revision: str | None = None
    devices: Sequence[str] = ("auto",)
    dtype: str | None = None
    compiled: bool = False


def generate(
    asked: GenerateRequest, client: DecodeClient, *, console: Console, environment: Mapping[str, str] = os.environ
) -> int:
    """Makes a picture of every prompt. Returns the exit status: 0 all made, 1 some failed, 130 stopped.

    Args:
        asked: what to do.
        client: where results come from.
        console: where to draw.
        environment: of the generator processes; tells them where latents go.

    Raises:
        InvalidJob: a row, an option or the pipeline cannot be used.
        ConfigurationError: prompts, pipeline or output cannot be read or written.
        BrokerError: the broker does not answer.
    """
    rows = read_rows(asked.prompts)
    if asked.pipeline == DEMO_PIPELINE:
        asked = _demo(asked)
    _check(asked, client)
    destination = open_destination(asked.out, client.settings)
    destination.check()
    client.ping()
    manifest = Manifest(destination.manifest, copy=destination.read_copy())
    generators = _generators(asked, environment)
    try:
        if manifest.torn_bytes:
            console.print(f"the manifest's last line was torn ({manifest.torn_bytes} bytes): cut off", highlight=False)
        for generator in generators:
            generator.load()
        return _run(
            asked, rows, client, generators=generators, destination=destination, manifest=manifest, console=console
        )
    finally:
        for generator in generators:
            generator.kill()
        for generator in generators:
            generator.join()
        manifest.close()


def _demo(asked: GenerateRequest) -> GenerateRequest:
    """The pipeline that ships with latentq, and its VAE."""
    folder = Path(str(resources.files("producer") / "demo_pipeline"))
    options = dataclasses.replace(asked.options, vae=asked.options.vae or "demo")
    return dataclasses.replace(asked, pipeline=str(folder), options=options)


def _check(asked: GenerateRequest, client: DecodeClient) -> None:
    """What can be refused without torch."""
    NameTemplate(asked.options.name_template)
    asked.options.check(client.settings)
    if asked.options.vae is not None:
        client.catalog[asked.options.vae]
    for device in asked.devices:
        if not _DEVICE.fullmatch(device):
            raise InvalidOption(f"device {device!r} is none; name them as cuda:0,cuda:1 or cpu", field="devices")
    if asked.dtype is not None and asked.dtype not in _DTYPES:
        raise InvalidOption(f"dtype is {asked.dtype!r}, expected one of {', '.join(_DTYPES)}", field="dtype")
    folder = Path(asked.pipeline).expanduser()
    if folder.is_dir():
        check_class(class_in(folder), vae=asked.options.vae)
    elif asked.pipeline.startswith((".", "/", "~")):
        raise ConfigurationError(f"there is no folder {asked.pipeline}", field="pipeline")


def _generators(asked: GenerateRequest, environment: Mapping[str, str]) -> list[ProcessGenerator]:
    seen: Counter[str] = Counter()
    generators = []
    for device in asked.devices:
        seen[device] += 1
        generators.append(
            ProcessGenerator(
                name=device if seen[device] == 1 else f"{device} #{seen[device]}",
                device=device,
                pipeline=asked.pipeline,
                revision=asked.revision,
                vae=asked.options.vae,
                dtype=asked.dtype,
                compiled=asked.compiled,
                environment=environment,
            )
        )
    return generators


def _run(
    asked: GenerateRequest,
    rows: Sequence[PromptRow],
    client: DecodeClient,
    *,
    generators: Sequence[ProcessGenerator],
    destination: Destination,
    manifest: Manifest,
    console: Console,
) -> int:
    ready = _loaded(generators, console)
    output = check_output(asked.options.output, ready.facts)
    recipe = settled(asked.options, pipeline=ready.identity, vae=ready.facts.vae, output=output)
    tasks = plan(rows, recipe)
    check_tasks(tasks, ready.facts, catalog=client.catalog, settings=client.settings)
    for generator in generators:
        generator.set_options(asked.options.of_submits(output))
    run = Run(
        tasks,
        client=client,
        recipe=recipe,
        options=asked.options,
        generators=generators,
        destination=destination,
        manifest=manifest,
    )
    display = display_of(console, run.tally, depth=lambda: run.depth)
    with display, _stopping_gently(run, generators, say=display.say) as was_stopped:
        if not client.store.served({ready.facts.vae}):
            display.say(f"no worker serves {ready.facts.vae} now: results come once one does (latentq worker)")
        run.on_event = display.event
        for result in run.results():
            display.result(result)
    console.print(f"files and {MANIFEST_NAME} are in {destination.url}", highlight=False, soft_wrap=True)
    console.print(summary(run.tally))
    if was_stopped():
        return _INTERRUPTED
    return 1 if run.tally.failed else 0


def _loaded(generators: Sequence[ProcessGenerator], console: Console) -> Ready:
    """What the generators say once all of them have loaded the pipeline.

    Raises:
        LatentqError: what one of them refused with.
    """
    answers = []
    with console.status("loading the pipeline") if console.is_terminal else contextlib.nullcontext():
        for generator in generators:
            while True:
                try:
                    answers.append(generator.ready.result(timeout=0.5))  # short: Ctrl-C is heard in between
                    break
                except StillLoading:
                    if generator.ready.done():
                        raise
    first = answers[0]
    for answer in answers:
        if (answer.facts, answer.identity) != (first.facts, first.identity):
            raise ConfigurationError("the generators have loaded different pipelines: the folder changed meanwhile")
    seconds = max(answer.seconds for answer in answers)
    console.print(
        f"{first.facts.name} loaded in {seconds:.1f} s on {', '.join(item.device for item in generators)}; "
        f"decoded by VAE {first.facts.vae}",
        highlight=False,
    )
    return first


@contextlib.contextmanager
def _stopping_gently(
    run: Run, generators: Sequence[ProcessGenerator], *, say: Callable[[str], None]
) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM: the prompt that is being denoised is finished and submitted. A second one ends at once."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            for generator in generators:
                generator.kill()
            raise KeyboardInterrupt
        stopped.set()
        say("stopping: what is being denoised is still submitted; again to stop at once")
        # In a thread of its own: the handler may have interrupted whoever holds the locks that stopping takes.
        threading.Thread(target=run.stop, name="farm-stop").start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
