"""The settings that compressed-tensors has for weights that are quantized and inputs that are not."""

from collections.abc import Sequence
from typing import Any


def compressed_settings(
    form: str, bits: int, kind: str, group_size: int | None, ignored: Sequence[str], **more: Any
) -> dict[str, Any]:
    """One group of every linear module, less those that are plain.

    Args:
        form: name that the library has for the format.
        bits: bits of a code.
        kind: "int" or "float".
        group_size: inputs that share a scale; None for all of an output's.
        ignored: names of the modules that are plain.
        more: settings of weights that only this format has.
    """
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
        **more,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }
