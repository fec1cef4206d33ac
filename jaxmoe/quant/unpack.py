"""Values of matrices that are held packed, on the host."""

from collections.abc import Mapping

import numpy as np

from jaxmoe.quant.base import Box, Shape, ceil_div
from jaxmoe.quant.codes import FLOAT4, apply_grid, exponents_to_float32, nibbles_to_float32, to_float32
from jaxmoe.quant.packing import Packing

_INT4 = np.arange(16, dtype=np.float32)


def packed_boxes(packing: Packing, box: Box, shape: Shape) -> dict[str, Box]:
    """The box of each array of a packed form, by role, that the values in a box are made from; none do of input scales.

    Args:
        packing: form of the matrices.
        box: range of the matrices along each dim.
        shape: shape of the matrices, [..., N, K].
    """
    found: dict[str, Box] = {}
    for role in packing.roles:
        if role == "input_scale":
            continue
        units = packing.units(role, shape)
        last = [(a // unit, ceil_div(b, unit)) for (a, b), unit in zip(box[-2:], units, strict=True)]
        found[role] = box[:-2] if role == "matrix_scale" else (*box[:-2], *last)
    return found


def unpack(packing: Packing, arrays: Mapping[str, np.ndarray], box: Box, shape: Shape) -> np.ndarray:
    """Decode a box of matrices that are held packed, float32.

    Args:
        packing: form of the matrices.
        arrays: contents of the boxes that `packed_boxes` names, by role.
        box: range of the matrices along each dim.
        shape: shape of the matrices, [..., N, K].
    """
    start, stop = box[-1]
    values, block = arrays["values"], packing.units("scale", shape)
    if packing.per_byte == 2:
        table = _INT4 if packing.format == "int4" else FLOAT4
        first = start % 2
        numbers = np.ascontiguousarray(nibbles_to_float32(values, table)[..., first : first + stop - start])
    else:
        numbers = to_float32(values)
    if packing.zero_points:
        apply_grid(np.subtract, numbers, to_float32(arrays["zero_point"]), box, block)
    elif packing.format == "int4":
        numbers -= 8
    scale = exponents_to_float32(arrays["scale"]) if packing.scales == "uint8" else to_float32(arrays["scale"])
    if packing.matrix_scales:
        scale = scale * arrays["matrix_scale"][..., None, None]
    apply_grid(np.multiply, numbers, scale, box, block)
    return numbers
