"""A quantized weight of a checkpoint: its format, its stored tensors, and the reading of any box of it."""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from jaxmoe.quant.base import Arrays, Box, QuantFormat, Shape, bytes_of, ceil_div, extent, swap_last, whole
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.layout import WeightLayout, boxes_of, layout_of, packed_boxes_of
from jaxmoe.quant.packing import Packing


class Header(Protocol):
    """A tensor of a checkpoint as its file's header describes it."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""

    @property
    def dtype_name(self) -> str:
        """Its element type, as safetensors spells it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, as stored."""


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """One weight in its format, addressed as the plain tensor that it stands for.

    Attributes:
        name: name of the plain tensor, such as "model.layers.0.mlp.experts.0.up_proj.weight".
        format: format that it is stored in.
        stored: header of each part that is there, by role.
        shape: shape of the plain tensor; None where headers do not tell, until `bind`.
    """

    name: str
    format: QuantFormat
    stored: Mapping[str, Header]
    shape: Shape | None

    def bind(self, shape: Shape) -> "QuantizedWeight":
        """This weight as one of a known shape.

        Args:
            shape: shape of the plain tensor, as the model has it.

        Raises:
            QuantizationError: the stored tensors are of another shape.
        """
        # Widths that are padded to whole words or bytes may be those of another shape than the one told by headers.
        problems = [] if shape == self.shape else self.problems(shape)
        if problems:
            raise QuantizationError(f"{self.name!r} must have shape {shape}: {problems[0]}")
        return dataclasses.replace(self, shape=shape)

    def problems(self, shape: Shape) -> list[str]:
        """The stored tensors that are not what the format asks for at a shape of the plain tensor, a sentence each."""
        matrices = swap_last(shape) if self.format.transposed else shape
        wrong = self.format.check_shape(matrices)
        if wrong:
            return [f"{wrong} ({self.format.describe()})"]
        found = []
        for part in self.format.parts:
            header = self.stored.get(part.role)
            if header is None or not part.decoded:
                continue
            expected = self.format.shapes(part.role, matrices)
            if header.dtype_name not in part.dtypes:
                found.append(
                    f"{header.name!r} is {header.dtype_name}, and {self.format.name} has {' or '.join(part.dtypes)}"
                )
            elif expected and header.shape not in expected:
                found.append(
                    f"{header.name!r} has shape {header.shape}; of a weight {shape} in {self.format.describe()} it is "
                    f"{' or '.join(str(one) for one in expected[:2])}"
                )
        return found

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that values are decoded from."""
        decoded = [part.role for part in self.format.parts if part.decoded and part.role in self.stored]
        return sum(bytes_of(self.stored[role].dtype_name, self.stored[role].shape) for role in decoded)

    def boxes(self, box: Box) -> Mapping[str, Box]:
        """The box of each stored tensor to read for a box of the plain tensor, by role.

        Args:
            box: range of the plain tensor along each dim, none of them empty.
        """
        return boxes_of(self._layout, self._matrices(box))

    def decode(
        self, arrays: Arrays, box: Box, *, out: np.ndarray | None = None, dtype: DTypeLike = np.float32
    ) -> np.ndarray:
        """The plain tensor's values in a box, computed in float32.

        Args:
            arrays: contents of the boxes that `boxes(box)` names, by role, of the stored dtypes.
            box: range of the plain tensor along each dim.
            out: array of the box's shape to write to, of any floating dtype; a new one by default.
            dtype: dtype of a new array.

        Raises:
            QuantizationError: a scale is zero or not finite, or what is stored contradicts itself.
        """
        result = np.empty(extent(box), dtype) if out is None else out
        self.check_scales(arrays)
        target = np.swapaxes(result, -1, -2) if self.format.transposed else result
        try:
            # A product beyond float32 is infinite, which is the loader's to see.
            with np.errstate(over="ignore", invalid="ignore"):
                self.format.decode(arrays, self._matrices(box), self._layout.shape, self._layout.shapes, target)
        except QuantizationError as error:
            raise QuantizationError(f"{self.name!r}: {error}") from error
        return result

    @property
    def packing(self) -> Packing | None:
        """The form in which the weight can stay packed, in the order of dims of the format's matrices; None if in none."""
        return self._layout.packing

    @property
    def values_as_stored(self) -> bool:
        """Whether the numbers of its packed form are the bytes of the stored tensor, in their order."""
        return self._layout.values_as_stored

    def packed_boxes(self, role: str, box: Box) -> Mapping[str, Box]:
        """The box of each stored tensor to read for one array of the packed form, as `boxes` for values."""
        if role == "input_scale":
            shape, lead = self.stored[role].shape, self._matrices(box)[:-2]
            return {role: whole(shape) if math.prod(shape) == 1 else (*lead, *whole(shape[len(lead) :]))}
        return packed_boxes_of(self._layout, role, self._matrices(box))

    def packed(self, role: str, arrays: Arrays, box: Box, block: tuple[int, int]) -> np.ndarray:
        """One array of the packed form, in a box of the plain tensor.

        Args:
            role: name in `jaxmoe.quant.packing.PACKED_ROLES`.
            arrays: contents of the boxes that `packed_boxes(role, box)` names, by role.
            box: range of the plain tensor along each dim, of whole elements of the array.
            block: (N, K) of the format's matrices that an element of the array stands for; of a grid, a divisor of the
                block that the weight has its entries for.

        Returns:
            The array in the order of dims of the plain tensor.

        Raises:
            QuantizationError: a scale is zero or not finite, or what is stored contradicts itself.
        """
        self.check_scales({name: array for name, array in arrays.items() if name != "input_scale"})
        packing, shape, matrices = self._layout.packing, self._layout.shape, self._matrices(box)
        assert packing is not None, f"{self.name} does not stay packed"
        try:
            if role == "input_scale":
                found = self._input_scales(arrays[role], extent(matrices[:-2]))
            else:
                found = self.format.packed(role, arrays, matrices, shape, self._layout.shapes)
        except QuantizationError as error:
            raise QuantizationError(f"{self.name!r}: {error}") from error
        if role != "values":
            native = packing.units(role, shape)
            for axis, unit, of, (start, stop) in zip((-2, -1), block, native, matrices[-2:], strict=True):
                if unit == of and found.shape[axis] == ceil_div(stop - start, unit):
                    continue  # an element is an entry
                entries = np.arange(start, stop, unit) // of - start // of
                if found.shape[axis] == 1:
                    entries = np.zeros_like(entries)  # a scale of the whole tensor may be held one an output
                found = np.take(found, entries, axis=axis)
        return np.swapaxes(found, -1, -2) if self.format.transposed else found

    def input_scale_problem(self) -> str | None:
        """The reason why the weight has no scale of its inputs that could be used; None if it has."""
        header, lead = self.stored.get("input_scale"), self._matrices(self._known())[:-2]
        if header is None:
            return "their scales are not in the checkpoint"
        part = next(part for part in self.format.parts if part.role == "input_scale")
        if header.dtype_name in part.dtypes and header.shape in ((), (1,), lead, (*lead, 1), (*lead, 1, 1)):
            return None
        return f"{header.name!r} is {header.dtype_name} of shape {header.shape}, and not one float for each matrix"

    def _input_scales(self, stored: np.ndarray, lead: Shape) -> np.ndarray:
        """The scales of the inputs of matrices [*lead, N, K], with the dims of a matrix of 1.

        Raises:
            QuantizationError: one is not finite, or not above zero.
        """
        scales = stored.astype(np.float32)
        if not np.all(np.isfinite(scales) & (scales > 0)):
            name = self.stored["input_scale"].name
            raise QuantizationError(f"{name!r} must hold scales that are finite and above zero; it has others")
        return np.broadcast_to(scales.reshape((1,) * len(lead) if scales.size == 1 else lead), lead)[..., None, None]

    def check_scales(self, arrays: Arrays) -> None:
        """Refuse scales with which no value can be right.

        Raises:
            QuantizationError: one is zero or not finite.
        """
        suspect = {role: found for role, array in arrays.items() if (found := _suspects(self.format, role, array)).size}
        for role, scales in self.format.scales(suspect).items():
            numbers = scales.astype(np.float32, copy=False)
            if not np.isfinite(numbers).all():
                raise QuantizationError(f"{self.stored[role].name!r} must hold finite scales; it has NaN or infinity")
            if not numbers.all():
                raise QuantizationError(f"{self.stored[role].name!r} must hold scales other than zero; it has zeros")

    def _known(self) -> Shape:
        assert self.shape is not None, f"{self.name} is bound to a shape first"
        return self.shape

    def _matrices(self, items: Any) -> Any:
        """A shape or box of the plain tensor as that of the format's matrices."""
        return swap_last(items) if self.format.transposed else items

    @cached_property
    def _layout(self) -> WeightLayout:
        stored = tuple([(role, header.dtype_name, header.shape) for role, header in self.stored.items()])
        return layout_of(self.format, stored, self._matrices(self._known()))


def _suspects(form: QuantFormat, role: str, array: np.ndarray) -> np.ndarray:
    """The entries of a part of which one may be no right scale; of bytes, of which there are many, the wrong ones alone."""
    if array.dtype.itemsize > 1 or not array.size:
        return array
    codes = array.view(np.uint8)
    wrong = [code for code in _wrong_codes(form, role, array.dtype) if (codes == code).any()]
    return np.array(wrong, np.uint8).view(array.dtype)


@lru_cache
def _wrong_codes(form: QuantFormat, role: str, dtype: np.dtype) -> tuple[int, ...]:
    """The codes of a byte with which a scale is zero or not finite."""
    scales = form.scales({role: np.arange(256, dtype=np.uint8).view(dtype)}).get(role)
    if scales is None:
        return ()
    numbers = scales.astype(np.float32)
    return tuple(np.flatnonzero(~np.isfinite(numbers) | (numbers == 0)).tolist())
