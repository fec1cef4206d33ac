"""The devices of a load as they fill up, shown on stderr."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from jaxmoe.progress import ProgressCallback, byte_bar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_MOST_ROWS = 8


class LoadCallbacks(NamedTuple):
    """The functions that a load tells how far it is; None where nobody listens.

    Attributes:
        read: function of (bytes done, bytes in all) of the files.
        placed: function of (device id, bytes that were put on it).
    """

    read: ProgressCallback | None
    placed: Callable[[int, int], None] | None


@contextmanager
def load_progress(
    title: str, progress: bool | ProgressCallback, devices: Sequence[int], each: int
) -> Iterator[LoadCallbacks]:
    """Give the functions that a load is to call, and show what they are told.

    A terminal gets a bar of the bytes that are read, and below it one for each device; where there are more than eight,
    for the emptiest and the fullest. Elsewhere there are four lines in all.

    Args:
        title: text before the bar.
        progress: True to show it, False for no report, or a callable to tell of the bytes that are read.
        devices: ids of the devices of this process.
        each: bytes that each of them will hold.
    """
    if progress is not True:
        yield LoadCallbacks(progress or None, None)
        return

    from rich.console import Console

    console, filling = Console(stderr=True), _Filling(devices, each)
    if not (console.is_terminal or console.is_jupyter):
        lines = _Lines(title, filling, console)
        yield LoadCallbacks(lines.read, filling.place)
        lines.tell()
        return

    from rich.console import Group
    from rich.live import Live

    bar = byte_bar(console)
    task = bar.add_task(title, total=None)
    with Live(Group(bar, filling), console=console, refresh_per_second=10):
        yield LoadCallbacks(lambda done, total: bar.update(task, completed=done, total=total), filling.place)


class _Filling:
    """The bytes that have been put on each device, and a table of bars that rich draws of them."""

    def __init__(self, devices: Sequence[int], each: int) -> None:
        self.placed = dict.fromkeys(devices, 0)
        self.each = each

    def place(self, device: int, count: int) -> None:
        self.placed[device] += count

    def __rich__(self) -> "Table":
        from rich.filesize import decimal
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        rows = {f"device {device}": device for device in self.placed}
        if len(rows) > _MOST_ROWS:
            order = sorted(self.placed, key=self.placed.__getitem__)
            rows = {f"emptiest, device {order[0]}": order[0], f"fullest, device {order[-1]}": order[-1]}
        table = Table.grid(padding=(0, 1))
        for name, device in rows.items():
            bar = ProgressBar(total=max(self.each, 1), completed=self.placed[device], width=40)
            table.add_row(f"  {name}", bar, f"{decimal(self.placed[device])} of {decimal(self.each)}")
        return table


class _Lines:
    """A line whenever another quarter has been read, and one at the end."""

    def __init__(self, title: str, filling: _Filling, console: "Console") -> None:
        self._title, self._filling, self._console = title, filling, console
        self._done, self._total, self._quarters = 0, 0, 0

    def read(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        if total and self._quarters < (quarters := 4 * done // total) < 4:
            self._quarters = quarters
            self.tell()

    def tell(self) -> None:
        from rich.filesize import decimal

        placed = self._filling.placed.values()
        self._console.out(
            f"{self._title}: {decimal(self._done)} of {decimal(self._total)} read, {decimal(min(placed))} to "
            f"{decimal(max(placed))} of {decimal(self._filling.each)} on each of {len(placed)} devices",
            highlight=False,
        )
