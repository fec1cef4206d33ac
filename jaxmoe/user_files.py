"""Folders of the user's home that jaxmoe keeps files in, where the XDG base directory specification has them."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Name the folder of what can be found out again, at some cost; it need not be there."""
    return _folder("XDG_CACHE_HOME", ".cache")


def data_folder() -> Path:
    """Name the folder of what the user asked to be kept; it need not be there."""
    return _folder("XDG_DATA_HOME", ".local/share")


def _folder(variable: str, default: str) -> Path:
    # The specification has relative paths ignored.
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / default) / "jaxmoe"
