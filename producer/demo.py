"""`latentq demo`: real latents, then real prompts, through a real broker to a worker process, and back as pictures."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from broker_config.errors import ConfigurationError, WaitTimeout
from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus
from broker_config.settings import load_settings
from broker_config.tensor_header import read_header
from producer.client import DecodeClient
from producer.job_handle import JobHandle
from producer.local_stack import LocalStack
from producer.prompt_demo import run_prompts

_VAE: Final = "demo"
#: A cold start imports torch, which takes half a minute on a slow disk.
_READY_TIMEOUT_S: Final = 180.0
_DONE_TIMEOUT_S: Final = 300.0
#: Formats in turn, so that each is seen once.
_FORMATS: Final = ("png", "jpg", "webp", "png")
_SHEET_HEIGHT_PX: Final = 240
_SHEET_GAP_PX: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoJob:
    """One job of the demo."""

    title: str
    job: JobHandle
    #: Name of the file it becomes; None: only for the contact sheet.
    file: str | None


def run_demo(out: Path, *, console: Console | None = None) -> int:
    """Runs the demo. Returns the exit status: 0 if every job succeeded.

    Args:
        out: folder for pictures, video and contact sheet; made if need be.
        console: where to draw.
    """
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="latentq-demo-") as folder:
        # A broker of its own, whatever is configured: the demo never touches the user's jobs.
        settings = load_settings(data_dir=Path(folder), log_level="WARNING").model_copy(update={"redis_url": None})
        stack = LocalStack(settings, vaes=(_VAE,))
        with _quiet_children(), stack.running() as connections:
            client = DecodeClient(connections, settings=settings)
            console.print(f"[bold]latentq demo[/bold]  broker {stack.url.removeprefix('unix://')}, one worker process")
            jobs = submit_all(client)
            with _progress(console) as progress:
                _wait_for_worker(client, stack, progress)
                snapshots = _wait_for_jobs(client, stack, jobs, progress)
            failed = [item for item in jobs if snapshots[item.job.id].status is not JobStatus.SUCCEEDED]
            console.print(_table(jobs, snapshots))
            files = _store(jobs, snapshots, out)
            status = run_prompts(out / "prompts", client, environment={"LATENTQ_REDIS_URL": stack.url}, console=console)
    for file in files:
        console.print(f"  {file}", highlight=False)
    console.print(f"all of it in {time.monotonic() - started:.1f} s")
    for item in failed:
        console.print(f"[red]{item.title}: {snapshots[item.job.id].errors}[/red]")
    return 1 if failed else status


@contextlib.contextmanager
def _quiet_children() -> Iterator[None]:
    """The processes log warnings only while the demo draws."""
    before = os.environ.get("LATENTQ_LOG_LEVEL")
    os.environ["LATENTQ_LOG_LEVEL"] = before or "WARNING"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LATENTQ_LOG_LEVEL"]


def submit_all(client: DecodeClient) -> list[DemoJob]:
    """Hands over the latents that ship with the demo VAE: photographs in several formats, a clip as video."""
    folder = Path(str(resources.files("worker") / "demo_vae" / "latents"))
    jobs = []
    photographs = sorted(path for path in folder.glob("*.safetensors") if path.stem != "clip")
    for number, path in enumerate(photographs):
        output = _FORMATS[number % len(_FORMATS)]
        job = client.submit_file(path, vae=_VAE, output=output, metadata={"title": path.stem})
        jobs.append(DemoJob(title=path.stem, job=job, file=f"{path.stem}.{output}"))
    clip = folder / "clip.safetensors"
    jobs.append(DemoJob(title="clip", job=client.submit_file(clip, vae=_VAE), file="clip.mp4"))
    frames = _read(clip)
    for number in (0, frames.shape[2] // 2, frames.shape[2] - 1):
        still = client.submit(frames[:, :, number], vae=_VAE, output="jpg")
        jobs.append(DemoJob(title=f"frame {number}", job=still, file=None))
    return jobs


def _read(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    data = path.read_bytes()
    header = read_header(data)
    return np.frombuffer(data, dtype=np.float16, offset=header.data_start).reshape(header.shape)


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _wait_for_worker(client: DecodeClient, stack: LocalStack, progress: Progress) -> None:
    task = progress.add_task("worker loads torch and the VAE", total=1)
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not client.store.served({_VAE}):
        stack.check()
        if time.monotonic() > deadline:
            raise ConfigurationError(f"no worker was ready within {_READY_TIMEOUT_S:.0f} s; see what it logged above")
        time.sleep(0.05)
    progress.update(task, completed=1)


def _wait_for_jobs(
    client: DecodeClient, stack: LocalStack, jobs: list[DemoJob], progress: Progress
) -> dict[str, JobSnapshot]:
    task = progress.add_task("decode, encode, store", total=len(jobs))
    waiting = {item.job.id: item.job for item in jobs}
    snapshots: dict[str, JobSnapshot] = {}
    deadline = time.monotonic() + _DONE_TIMEOUT_S
    while waiting:
        stack.check()
        if time.monotonic() > deadline:
            raise WaitTimeout(f"{len(waiting)} jobs of the demo did not finish within {_DONE_TIMEOUT_S:.0f} s")
        for job in client.as_completed(waiting.values(), timeout=1.0):
            snapshots[job.id] = job.snapshot()
            del waiting[job.id]
            progress.advance(task)
            break
    return snapshots


def _table(jobs: list[DemoJob], snapshots: dict[str, JobSnapshot]) -> Table:
    table = Table(header_style="bold")
    table.add_column("job")
    table.add_column("VAE")
    table.add_column("latents")
    for heading in ("wait", "decode", "encode", "size"):
        table.add_column(heading, justify="right")
    for item in jobs:
        snapshot = snapshots[item.job.id]
        assert snapshot.request is not None
        row = [item.title, snapshot.vae, "×".join(str(size) for size in snapshot.request.shape)]
        if snapshot.result is None:
            table.add_row(*row, "", "", "", str(snapshot.status))
            continue
        times = snapshot.result.timings_s
        size = sum(artifact.blob.size_bytes for artifact in snapshot.result.artifacts)
        table.add_row(
            *row,
            f"{(snapshot.started_ms - snapshot.submitted_ms) / 1000:.2f} s",
            f"{times['decode']:.2f} s",
            f"{times['encode']:.2f} s",
            f"{size / 1000:.0f} kB {snapshot.request.output}",
        )
    return table


def _store(jobs: list[DemoJob], snapshots: dict[str, JobSnapshot], out: Path) -> list[Path]:
    files: list[Path] = []
    pictures: list[tuple[str, Image.Image]] = []
    for item in jobs:
        if snapshots[item.job.id].status is not JobStatus.SUCCEEDED:
            continue
        if item.file is not None:
            (_, data), *_ = item.job.artifacts()
            (out / item.file).write_bytes(data)
            files.append(out / item.file)
        if item.file != "clip.mp4":
            pictures.append((item.title, item.job.image().convert("RGB")))
    if pictures:
        contact_sheet(pictures).save(out / "contact-sheet.png")
        files.append(out / "contact-sheet.png")
    return files


def contact_sheet(pictures: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of one height with their titles, in rows of at most four."""
    gap, height, caption = _SHEET_GAP_PX, _SHEET_HEIGHT_PX, 16
    thumbs = [
        (title, image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS))
        for title, image in pictures
    ]
    rows = [thumbs[start : start + 4] for start in range(0, len(thumbs), 4)]
    width = max(sum(image.width + gap for _, image in row) for row in rows) + gap
    sheet = Image.new("RGB", (width, len(rows) * (height + caption + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        x, y = gap, gap + number * (height + caption + gap)
        for title, image in row:
            sheet.paste(image, (x, y))
            draw.text((x, y + height + 2), title, fill="black")
            x += image.width + gap
    return sheet
