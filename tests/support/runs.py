"""The run at hand: short, or everything. `tests/conftest.py` sets it before any test file is imported."""

full = False
live = False  # with torch and transformers to compare with, and everything run


def examples(few: int, many: int) -> int:
    """Examples that a property test draws: in the short run `few`, in the full one `many`."""
    return many if full else few
