"""What a person sees beside the answer: where we are, and how far; on stderr, if it is a terminal.

Rich is imported when something is drawn, not before.
"""

import sys
import threading
import unicodedata
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Activity:
    """A line that says what is going on, with a bar while its length is known.

    Nothing is drawn where stderr is no terminal. Its methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._text = ""
        self._lock = threading.Lock()

    def __enter__(self) -> "Activity":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.clear()

    def say(self, text: str) -> None:
        """From now on we do this, and do not know how long."""
        self._draw(text, 0, 0, "")

    def clear(self) -> None:
        """Take the line away; the next `say` brings it back."""
        with self._lock:
            if self._progress is not None:
                self._progress.stop()
            self._progress, self._task = None, None

    def on_bytes(self, text: str, done: int, total: int) -> None:
        """So many bytes of so many are through."""
        self._draw(text, done, total, f"{done / 1e6:.1f} of {total / 1e6:.1f} MB")

    def on_blocks(self, text: str, done: int, total: int) -> None:
        """So many blocks of so many are through."""
        self._draw(text, done, total, f"{done} of {total}")

    def _draw(self, text: str, done: int, total: int, detail: str) -> None:
        if not self._is_shown:
            return
        with self._lock:
            if self._progress is None:
                self._progress = _new_progress()
                self._progress.start()
            if self._task is None or text != self._text:
                if self._task is not None:
                    self._progress.remove_task(self._task)
                self._task = self._progress.add_task(text, total=None, detail="")
                self._text = text
            self._progress.update(
                self._task, completed=done, total=total or None, detail=detail, visible=True
            )


def _new_progress() -> "Progress":
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn

    class KnownBar(BarColumn):
        """A bar only where the length is known; the spinner does for the rest."""

        def render(self, task: Task) -> RenderableType:  # type: ignore[override]  # less, here
            return "" if task.total is None else super().render(task)

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        KnownBar(bar_width=30),
        TextColumn("{task.fields[detail]}"),
        console=Console(stderr=True),
        transient=True,
    )


def tell(text: str) -> None:
    """A line for the person, beside the answer."""
    click.echo(text, err=True)


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: a model's answer may hold escape sequences."""
    return "".join("�" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def binary_size(num_bytes: float) -> str:
    """As in "5.1 GiB"."""
    for unit in ("MiB", "GiB"):
        num_bytes /= 1024 if unit == "GiB" else 2**20
        if num_bytes < 1000:
            break
    return f"{num_bytes:.1f} {unit}" if num_bytes < 100 else f"{num_bytes:.0f} {unit}"


def milliseconds(seconds: float | None) -> str:
    """For tables."""
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"
