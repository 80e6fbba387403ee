"""What a person sees of a run: two bars on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from producer.prompt_farm.events import Delayed, Denoised, Event, Failed, GivenUp, Restarted
from producer.prompt_farm.results import FarmResult
from producer.prompt_farm.tally import Tally

_BAR_CHARS: Final = 32
_REFRESH_PER_S: Final = 4
#: Lines are this far apart, unless something fails.
_LINE_EVERY_S: Final = 5.0
#: What is delayed for one reason is said once in this time.
_SAID_EVERY_S: Final = 30.0


class Display(Protocol):
    """Shows a run; a context manager."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def event(self, event: Event) -> None:
        """Something happened."""
        ...

    def result(self, result: FarmResult) -> None:
        """A task has ended."""
        ...

    def say(self, words: str) -> None:
        """A line that stays."""
        ...


def display_of(console: Console, tally: Tally, *, depth: Callable[[], int]) -> Display:
    """The display that fits where the output goes."""
    return LiveDisplay(console, tally, depth=depth) if console.is_terminal else LineDisplay(console, tally, depth=depth)


class _Teller:
    """What both displays say in lines."""

    def __init__(self, console: Console, tally: Tally, *, depth: Callable[[], int]) -> None:
        """Args:
        console: where to draw.
        tally: what is counted.
        depth: results under way.
        """
        self._console = console
        self._tally = tally
        self._depth = depth
        self._said: dict[tuple[str, str], float] = {}
        self._last = ""

    def event(self, event: Event) -> None:
        """Says what did not go on, or died."""
        if isinstance(event, Delayed):
            key, now = (event.stage, event.code), time.monotonic()
            if now - self._said.get(key, -_SAID_EVERY_S) >= _SAID_EVERY_S:
                self._said[key] = now
                self.say(f"{event.stage} waits: {event.message} [{event.code}]", style="yellow")
        elif isinstance(event, Restarted):
            self.say(f"{event.message}; another one is started", style="yellow")
        elif isinstance(event, GivenUp):
            self.say(f"{event.device} is given up: {event.message}", style="red")

    def result(self, result: FarmResult) -> None:
        """Says what failed, and remembers what did not."""
        if result.error is None:
            self._last = result.file or result.job_id
            return
        self.say(describe(result.error, line=result.task.row.line), style="red")

    def say(self, words: str, *, style: str = "") -> None:
        """A line that stays."""
        stamp = "" if self._console.is_terminal else time.strftime("%H:%M:%S ")
        self._console.print(Text(f"{stamp}{words}", style=style), soft_wrap=True)

    def _state(self) -> str:
        tally = self._tally
        parts = [f"{self._depth()} in the queue"]
        if tally.failed:
            parts.append(f"{tally.failed} failed")
        if tally.finished_before:
            parts.append(f"{tally.finished_before} were finished before")
        if tally.adopted:
            parts.append(f"{tally.adopted} adopted")
        if tally.remaining_s is not None:
            parts.append(f"{clock(tally.remaining_s)} remaining")
        return " · ".join(parts)


class LiveDisplay(_Teller):
    """Two bars that move."""

    def __init__(self, console: Console, tally: Tally, *, depth: Callable[[], int]) -> None:
        super().__init__(console, tally, depth=depth)
        self._live = Live(
            get_renderable=self._draw, console=console, refresh_per_second=_REFRESH_PER_S, redirect_stderr=True
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.refresh()
        self._live.stop()

    def _draw(self) -> Group:
        tally = self._tally
        made = tally.finished_before + tally.saved
        # What was submitted before this run was denoised before it, too.
        denoised = min(tally.total, tally.finished_before + tally.adopted + tally.denoised)
        bars = Table.grid(padding=(0, 1))
        for name, count, rate in (("denoised", denoised, tally.denoise_rate), ("decoded", made, tally.save_rate)):
            bars.add_row(
                name,
                ProgressBar(total=max(1, tally.total), completed=count, width=_BAR_CHARS),
                Text(f"{count}/{tally.total}", justify="right"),
                Text("" if rate is None else speed(rate), style="dim"),
            )
        last = Text(f"last: {self._last}", style="dim", no_wrap=True, overflow="ellipsis") if self._last else Text("")
        return Group(bars, Text(self._state(), no_wrap=True, overflow="ellipsis"), last)


class LineDisplay(_Teller):
    """A line now and then, for logs."""

    def __init__(self, console: Console, tally: Tally, *, depth: Callable[[], int]) -> None:
        super().__init__(console, tally, depth=depth)
        self._lined = 0.0

    def __enter__(self) -> Self:
        self._lined = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line()

    def event(self, event: Event) -> None:
        """As `_Teller.event`; now and then says how far the run is."""
        super().event(event)
        if not isinstance(event, Denoised | Failed):
            return
        if time.monotonic() - self._lined >= _LINE_EVERY_S:
            self._line()

    def result(self, result: FarmResult) -> None:
        """As `_Teller.result`; now and then says how far the run is."""
        super().result(result)
        if time.monotonic() - self._lined >= _LINE_EVERY_S:
            self._line()

    def _line(self) -> None:
        self._lined = time.monotonic()
        tally = self._tally
        denoised = min(tally.total, tally.finished_before + tally.adopted + tally.denoised)
        made = tally.finished_before + tally.saved
        rates = "".join(f" ({speed(rate)})" if rate is not None else "" for rate in (tally.save_rate,))
        self.say(f"denoised {denoised}/{tally.total}, decoded {made}/{tally.total}{rates}, {self._state()}")


def describe(error: Failed, *, line: int) -> str:
    """A failure as one line."""
    message = " ".join(error.message.split())
    return f"line {line}: {error.stage} failed: {message} [{error.code}]"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def speed(rate: float) -> str:
    """A rate a person can read."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"


def summary(tally: Tally) -> Table:
    """The table at the end of a run."""
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_column("means", style="dim", overflow="fold")

    def row(what: str, figure: str, means: str) -> None:
        table.add_row(what, figure, means)

    row("made", str(tally.saved), "results that this run brought home")
    if tally.finished_before:
        row("finished before", str(tally.finished_before), "left alone")
    if tally.adopted:
        row("adopted", str(tally.adopted), "submitted before, not denoised again")
    if tally.failed:
        row("failed", f"[red]{tally.failed}[/red]", "the same command tries them again")
    if tally.left:
        row("left", str(tally.left), "the same command goes on with them")
    overlap = tally.overlap
    if overlap is None or overlap.ratio is None:
        return table
    row("W  wall time", f"{overlap.wall_s:.2f} s", "first prompt to last result")
    row("D  denoise", f"{overlap.denoise_s:.2f} s", "busiest device")
    row("V  decode, encode", f"{overlap.decode_s:.2f} s", "busiest worker")
    row("overlap ratio", f"{overlap.ratio:.2f}", "(D + V - W) / min(D, V); 1: all of it")
    row("speed-up", f"{overlap.speed_up:.2f}", f"(D + V) / W; bound {overlap.bound:.2f}, all of it")
    return table
