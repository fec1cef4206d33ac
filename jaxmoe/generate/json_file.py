"""The small JSON files of a checkpoint that may be missing."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds one JSON object; got {type(value).__name__}")
    return value
