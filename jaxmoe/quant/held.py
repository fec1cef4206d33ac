"""Weights that are stored as devices hold them: the arrays of a packed form, each a tensor of its own."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from jaxmoe.quant.base import Arrays, Box, Part, QuantFormat, Shape, Shapes
from jaxmoe.quant.codes import exponents_to_float32, not_zero
from jaxmoe.quant.packing import OF_MATRICES, Packing
from jaxmoe.quant.unpack import packed_boxes, unpack


@dataclasses.dataclass(frozen=True)
class HeldFormat(QuantFormat):
    """W = (decode(values) - zero_points) · scales · matrix_scales, stored in the arrays of a `Packing`.

    It is no format of published checkpoints, so `jaxmoe.quant.formats.FORMATS` does not have it: a checkpoint that jaxmoe
    wrote says which packing each weight has.

    Attributes:
        form: packed form of the weight.
    """

    form: Packing

    name = "packed"
    parts = (
        Part("values", ("",), ("F8_E4M3", "I8", "U8")),
        Part("scale", ("",), ("F32", "BF16", "F16", "U8", "F8_E4M3")),
        Part("zero_point", ("",), ("U8",), required=False),
        Part("matrix_scale", ("",), ("F32",), required=False),
        Part("input_scale", ("",), ("F32",), required=False, decoded=False),
    )
    packed_from: ClassVar[Mapping[str, tuple[str, ...]]] = {
        role: (role,) for role in ("values", "scale", "zero_point", "matrix_scale")
    }

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        """See `QuantFormat`."""
        *lead, N, K = shape
        if role in OF_MATRICES:
            return (tuple(lead),)
        rows, columns = self.form.units(role, shape)
        return ((*lead, N // rows, K // columns),)

    def shape_of(self, stored: Shapes) -> Shape:
        """See `QuantFormat`."""
        *lead, width = stored["values"]
        return (*lead, width * self.form.per_byte)

    def boxes(self, box: Box, shape: Shape, stored: Shapes) -> dict[str, Box]:
        """See `QuantFormat`."""
        return packed_boxes(self.form, box, shape)

    def values(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        """See `QuantFormat`."""
        return unpack(self.form, arrays, box, shape)

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing:
        """See `QuantFormat`; inputs are rounded only where that is asked for."""
        return dataclasses.replace(self.form, activations=None)

    def values_as_stored(self, shape: Shape) -> bool:
        """See `QuantFormat`."""
        return True

    def packed(self, role: str, arrays: Arrays, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        """See `QuantFormat`."""
        return arrays[role][..., None, None] if role in OF_MATRICES else arrays[role]

    def scales(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """See `QuantFormat`; whether one may be zero was for the format that it came from to say."""
        return {role: not_zero(exponents_to_float32(array)) for role, array in super().scales(arrays).items()}

    def describe(self) -> str:
        """See `QuantFormat`."""
        return dataclasses.replace(self.form, activations=None).describe()
