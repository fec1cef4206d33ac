"""Values of a quantization block, checked as they are taken."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.quant.errors import QuantizationError

Block = Mapping[str, Any]


def whole(block: Block, *names: str, default: int | None = None) -> int | None:
    """The first of these entries that is there, a whole number.

    Raises:
        QuantizationError: it is something else.
    """
    for name in names:
        value = block.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int):
                raise QuantizationError(f"{name} of a quantization must be a whole number; it is {value!r:.40}")
            return value
    return default


def group_size(block: Block, *names: str, default: int | None = None) -> int | None:
    """The size of a group of inputs; None for all of an output's.

    Raises:
        QuantizationError: it is neither positive nor -1.
    """
    size = whole(block, *names, default=default)
    if size is not None and size < 1 and size != -1:
        raise QuantizationError(
            f"{names[0]} of a quantization must be positive, or -1 for a whole output; it is {size}"
        )
    return None if size == -1 else size


def names(block: Block, *keys: str) -> list[Any]:
    """The list of modules under the first of these keys that has one; empty without.

    Raises:
        QuantizationError: it is no list.
    """
    for key in keys:
        value = block.get(key)
        if value is not None:
            if not isinstance(value, list):
                raise QuantizationError(f"{key} of a quantization must be a list of modules; it is {value!r:.40}")
            return value
    return []


def pair(block: Block, name: str) -> tuple[int, int] | None:
    """Two positive sizes, None where they are not given.

    Raises:
        QuantizationError: it is something else.
    """
    value = block.get(name)
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)):
        raise QuantizationError(f"{name} of a quantization must be two positive sizes; it is {value!r:.40}")
    return value[0], value[1]


def table(block: Block, name: str) -> Mapping[str, Any]:
    """An object, empty where it is not given.

    Raises:
        QuantizationError: it is something else.
    """
    value = block.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise QuantizationError(f"{name} of a quantization must be an object; it is {value!r:.40}")
    return value


def refuse(what: str, value: Any, known: str) -> QuantizationError:
    """The error of a setting that no reader knows."""
    return QuantizationError(
        f"{what} {value!r:.60} is none that jaxmoe decodes; it decodes {known}. Take the model's bfloat16 release, or one "
        "in a format of these"
    )


def cache_note(block: Block) -> list[str]:
    """A note that the cache's own format is not followed, where one is asked for."""
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        scheme = block.get(key)
        if scheme:
            told = str(scheme)[:60]
            if isinstance(scheme, dict):
                told = f"{scheme.get('num_bits', '?')}-bit {scheme.get('type', '')}"
            return [f"{key} ({told.strip()}) is not followed: the cache of keys and values stays in the model's dtype"]
    return []
