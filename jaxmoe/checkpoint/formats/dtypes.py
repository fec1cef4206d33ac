"""Element types of safetensors files, and the casts that are allowed on the way to the mesh."""

import dataclasses

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class ElementType:
    """One element type of the safetensors format.

    Attributes:
        bits: size of an element on disk.
        dtype: the NumPy dtype with the same bytes; None for types smaller than a byte, which NumPy
            cannot address in their packed form.
    """

    bits: int
    dtype: np.dtype | None


def _whole_bytes(scalar: type) -> ElementType:
    dtype = np.dtype(scalar)
    return ElementType(8 * dtype.itemsize, dtype)


ELEMENT_TYPES = {
    "BOOL": _whole_bytes(np.bool_),
    "F4": ElementType(4, None),
    "F6_E2M3": ElementType(6, None),
    "F6_E3M2": ElementType(6, None),
    "U8": _whole_bytes(np.uint8),
    "I8": _whole_bytes(np.int8),
    "F8_E5M2": _whole_bytes(ml_dtypes.float8_e5m2),
    "F8_E4M3": _whole_bytes(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": _whole_bytes(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": _whole_bytes(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": _whole_bytes(ml_dtypes.float8_e5m2fnuz),
    "I16": _whole_bytes(np.int16),
    "U16": _whole_bytes(np.uint16),
    "F16": _whole_bytes(np.float16),
    "BF16": _whole_bytes(ml_dtypes.bfloat16),
    "I32": _whole_bytes(np.int32),
    "U32": _whole_bytes(np.uint32),
    "F32": _whole_bytes(np.float32),
    "F64": _whole_bytes(np.float64),
    "I64": _whole_bytes(np.int64),
    "U64": _whole_bytes(np.uint64),
    "C64": _whole_bytes(np.complex64),
}
"""Name in the header -> type. Quantized formats read their bytes through ``U8`` and these float8 types."""

DTYPE_NAMES = {element.dtype: name for name, element in ELEMENT_TYPES.items() if element.dtype is not None}
"""NumPy dtype -> name in the header."""

# An 8-bit float means nothing without its scale, so only these are numbers that may be rounded to one another.
_PLAIN_FLOATS = frozenset(np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))
_FLOATS = frozenset(
    element.dtype for name, element in ELEMENT_TYPES.items() if element.dtype and name.startswith(("F", "BF"))
)


def can_cast(source: np.dtype, target: np.dtype) -> bool:
    """Whether a tensor of `source` may fill a parameter of `target`: the same type, both plain floats, or indices.

    torch's indices have 64 bits, of which a number of experts needs few.
    """
    return source == target or {source, target} <= _PLAIN_FLOATS or (source == np.int64 and target == np.int32)


def is_float(dtype: np.dtype) -> bool:
    """Whether `dtype` has values that are not finite."""
    return dtype in _FLOATS
