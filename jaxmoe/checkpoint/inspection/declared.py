"""The quantization that a checkpoint's files declare, of whatever kind, as `summarize` shows it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.quant import find_settings, read_side_files


def describe_quantization(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give the settings of a quantization, also of a method that jaxmoe does not decode.

    Args:
        directory: folder with the checkpoint's files.
        config: contents of config.json.

    Returns:
        Its plain settings, with "method" and "from", the name of the file; None where none is declared.
    """
    declared = find_settings(config, read_side_files(directory))
    if declared is None:
        return None
    settings = declared.block
    # Lists of modules have an entry for each layer and say little.
    plain = {key: value for key, value in settings.items() if isinstance(value, str | int | float) or value is None}
    sizes = {key: value for key, value in settings.items() if key == "weight_block_size"}
    method = settings.get("quant_method") or settings.get("quant_algo") or declared.method
    return {"method": method, "from": declared.source, **plain, **sizes}
