"""Mixture-of-Experts checkpoints on a (dp, tp, ep) mesh of GPUs, with JAX.

The public names are imported on first use, so that ``import jaxmoe`` is cheap,
does not import JAX and starts no backend: a script may still choose its devices
(:func:`jaxmoe.simulate_devices`) after the import.
"""

import ast
import importlib
import time
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
# Seconds since the epoch: sources that are newer may not be those that run.
__imported__ = time.time()

# The stub beside this file has the names once, in the form that type checkers and editors understand.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {alias.name: line.module for line in _STUB.body if isinstance(line, ast.ImportFrom) for alias in line.names}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxmoe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
