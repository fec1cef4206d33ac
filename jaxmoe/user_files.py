"""Folders of the user's home that jaxmoe keeps files in, where the XDG base directory specification has them."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """What can be found out again, at some cost; it is not made."""
    return _folder("XDG_CACHE_HOME", ".cache")


def data_folder() -> Path:
    """What the user asked to be kept; it is not made."""
    return _folder("XDG_DATA_HOME", ".local/share")


def _folder(variable: str, default: str) -> Path:
    # The specification has relative paths ignored.
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / default) / "jaxmoe"
