"""How a build goes on, and what came of it, in words."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dcar.data.build import Tally
from dcar.data.distributors import Outcome
from dcar.data.wording import amount

QUIET_SECONDS = 30.0  # between two lines where no bar can be drawn


def size_text(size: float) -> str:
    """Bytes in units of 1000."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if size < 999.5 else f"{size:.0f} {units[0]}"


def reasons_text(
    dropped: Mapping[str, int], examples: Mapping[str, Sequence[str]] | None = None
) -> str:
    """`2 no caption (cat, dog), 1,200 broken image (a, b, c, ...)`."""
    listed = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    named = (
        f"{times:,} {reason}{_names((examples or {}).get(reason, ()), times)}"
        for reason, times in listed
    )
    return ", ".join(named) or "none"


def _names(keys: Sequence[str], times: int) -> str:
    return f" ({', '.join(keys)}{', ...' if times > len(keys) else ''})" if keys else ""


def tally_text(split: str, tally: Tally) -> str:
    return (
        f"{split}: {amount(tally.samples, 'sample')} in {amount(tally.shards, 'shard')}, "
        f"{size_text(tally.bytes)}; "
        f"left out: {reasons_text(tally.dropped, tally.examples)}"
    )


class ProgressLine:
    """A bar with rate and time left on a terminal, else a line now and then."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None

    def begin(self, what: str, units: int, images: int | None) -> None:
        self.close()
        self.what, self.units, self.images = what, units, images
        self._units_done = self._seen = self._bytes = 0
        self._begun = self._said = time.monotonic()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[at]}", markup=False),
            )
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(what, total=1.0, at="")

    def tick(self, images: int, size: int) -> None:
        self._seen, self._bytes = images, size
        if self._bar is not None:
            self._bar.update(self._task, completed=self._share(), at=self._text())
        elif time.monotonic() - self._said >= QUIET_SECONDS:
            self._said = time.monotonic()
            self.console.print(f"{self.what}: {self._text()}", soft_wrap=True, highlight=False)

    def finished(self, outcome: Outcome) -> None:
        self._units_done += 1
        if outcome.error is not None:
            message = f"{outcome.name} failed: {outcome.error}"
            self.console.print(message, soft_wrap=True, highlight=False, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _share(self) -> float:
        if self.images:
            return min(1.0, self._seen / self.images)
        return self._units_done / self.units

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._begun, 1e-9)
        share = self._share()
        left = timedelta(seconds=round(seconds * (1 - share) / share)) if share else "?"
        rate = f"{self._seen / seconds:,.0f} images/s, {self._bytes / seconds / 1e6:,.1f} MB/s"
        units = f"{self._units_done} of {self.units} units"
        return f"{units}, {self._seen:,} images, {rate}, {left} left"
