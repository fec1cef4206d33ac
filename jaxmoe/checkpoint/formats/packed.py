"""Quantized weights that stay packed: each array of their packed form as a tensor of its own."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxmoe.checkpoint.boxes import Box
from jaxmoe.checkpoint.formats.decoded import DecodedTensor
from jaxmoe.checkpoint.formats.safetensors import TensorInfo

_FIELDS = tuple(field.name for field in dataclasses.fields(DecodedTensor))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor(DecodedTensor):
    """One array of the packed form of a quantized weight, in the order of dims of the plain tensor.

    `shape` counts the array's own elements. `dtype` is that of the array; values are never cast.

    Attributes:
        role: name in `jaxmoe.quant.packing.PACKED_ROLES`.
        units: elements of the plain tensor, along its last two dims, that one element stands for.
    """

    role: str
    units: tuple[int, int]

    @classmethod
    def of(cls, tensor: DecodedTensor, role: str, units: tuple[int, int], dtype: np.dtype) -> "PackedTensor":
        """Make the tensor of one array.

        Args:
            tensor: weight as the plain tensor that it stands for.
            role: name of the array.
            units: elements of the plain tensor that an element is for; they divide its last two dims.
            dtype: dtype of the array, `Packing.dtype`.
        """
        *lead, rows, columns = tensor.shape
        fields = {name: getattr(tensor, name) for name in _FIELDS}
        fields |= {"shape": (*lead, rows // units[0], columns // units[1]), "dtype": dtype}
        return cls(**fields, role=role, units=units)

    def stored_boxes(self, box: Box) -> Mapping[str, Box]:
        """The box of each part, by role, that the elements in `box` are made from."""
        return self.weight.packed_boxes(self.role, self._in_weight(self.whole_box(box)))

    def decode_into(self, arrays: Mapping[str, np.ndarray], box: Box, into: np.ndarray) -> None:
        """Put the elements of a box whose dims are together into an array of its shape."""
        into[...] = self.decode_whole(arrays, box, into.dtype)

    def decode_whole(self, arrays: Mapping[str, np.ndarray], box: Box, dtype: np.dtype) -> np.ndarray:
        """The elements of a box whose dims are together."""
        units = self.units[::-1] if self.weight.format.transposed else self.units
        return self.weight.packed(self.role, arrays, self._in_weight(box), units).astype(dtype, copy=False)

    def as_it_is(self) -> TensorInfo:
        """The stored tensor itself, seen as this array, where its bytes are those of the array; else this tensor."""
        part = self.parts[self.role] if self.role == "values" else None
        if part is None or part.dim_order is not None or not self.weight.values_as_stored:
            return self
        return dataclasses.replace(part, dtype=self.dtype, shape=self.shape, dim_order=self.dim_order)

    def _in_weight(self, box: Box) -> Box:
        """The box of the plain tensor that the elements of `box` stand for."""
        *lead, rows, columns = box
        scaled = [(start * unit, stop * unit) for (start, stop), unit in zip((rows, columns), self.units, strict=True)]
        return (*lead, *scaled)
