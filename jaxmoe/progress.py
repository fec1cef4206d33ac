"""A progress bar on stderr for work that is counted in bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ProgressCallback = Callable[[int, int], None]


def check_progress(progress: Any) -> None:
    """Refuse what `byte_progress` cannot report to.

    Raises:
        TypeError: it is neither True, False nor a function.
    """
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(
            f"progress is True, False or a function of bytes done and bytes in all; got {type(progress).__name__}"
        )


@contextmanager
def byte_progress(title: str, progress: bool | ProgressCallback) -> Iterator[ProgressCallback | None]:
    """Give the callback ``(bytes_done, bytes_total)`` to report to.

    Args:
        title: text before the bar.
        progress: True for a bar, False for no report, or a callable to use as it is.
    """
    if progress is False:
        yield None
        return
    if progress is not True:
        yield progress
        return

    from rich.console import Console

    with byte_bar(console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def byte_bar(console: "Console") -> "Progress":
    """Make the bar, which nobody draws yet."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)
