"""Numbers as commands show them to people."""


def show_count(value: int | None) -> str:
    """Show a number of things in three digits and the usual letter.

    >>> [show_count(value) for value in (30_532_122_624, 7_200_000, 98_304, None)]
    ['30.5B', '7.2M', '98,304', 'unknown']
    """
    if value is None:
        return "unknown"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,}"


def show_bytes(value: float) -> str:
    """Show bytes in three digits and the largest unit that they reach, of powers of 1000.

    >>> [show_bytes(value) for value in (80e9, 14_400_000, 12)]
    ['80 GB', '14.4 MB', '12 bytes']
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} bytes"
