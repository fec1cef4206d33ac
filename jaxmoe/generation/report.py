"""Text and tables for a terminal."""

import unicodedata
from collections.abc import Mapping

from rich.table import Table

_BAR_WIDTH = 24


def expert_bytes_table(expert_bytes_per_device: Mapping[int, int]) -> Table:
    """Bytes of expert weights on each device, with a bar that shows the balance.

    Args:
        expert_bytes_per_device: bytes by device id, as ``model.load_report.expert_bytes_per_device`` has it.

    Returns:
        A rich table, for ``rich.console.Console(stderr=True).print``.

    Example:
        >>> expert_bytes_table({0: 3_000_000, 1: 1_000_000}).row_count
        3
    """
    table = Table(title="Expert weights per device", title_justify="left", show_footer=False)
    table.add_column("device", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", justify="left")
    total = sum(expert_bytes_per_device.values())
    most = max(expert_bytes_per_device.values(), default=0)
    for device, size in sorted(expert_bytes_per_device.items()):
        bar = "█" * round(_BAR_WIDTH * size / most) if most else ""
        table.add_row(str(device), f"{size:,}", f"{size / total:.1%}" if total else "-", bar)
    table.add_section()
    table.add_row("all", f"{total:,}", "", "")
    return table


def terminal_text(text: str) -> str:
    r"""Generated text that is safe to print to a terminal: control characters become replacement characters.

    A model may write any bytes, escape sequences that take over the terminal among them.

    Example:
        >>> terminal_text("red: \x1b[31m")
        'red: �[31m'
    """
    return "".join("�" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text)
