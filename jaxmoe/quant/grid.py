"""Formats whose values lie in order, times a grid of scales: one for each block, group, channel or the whole tensor."""

import abc
import math
from typing import ClassVar

import numpy as np

from jaxmoe.quant.base import Arrays, Box, QuantFormat, Shape, Shapes, ceil_div, extent
from jaxmoe.quant.codes import apply_grid, to_float32


class GridFormat(QuantFormat):
    """W = (codes - zero_point) · scale, where an entry of the grids stands for a block of the matrices [..., N, K].

    Grids are found by their shapes: [..., N/bn, K/bk], [..., N] for one a row, leading dims alone for one a matrix, and
    a single number for all. Roles are "values", "scale" and, where a format has it, "zero_point".

    A subclass says which box of "values" a box needs, and what its codes are.
    """

    grids: ClassVar[tuple[str, ...]] = ("scale",)

    @abc.abstractmethod
    def value_box(self, box: Box, shape: Shape, stored: Shapes) -> Box:
        """The box of "values" for `box` of the matrices."""

    @abc.abstractmethod
    def codes(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        """Codes in `box` as float32, of what `value_box` says; an array that may be written to, such as `out`."""

    def scale(self, arrays: Arrays, shape: Shape) -> np.ndarray:
        """The grid of scales as float32, all of a format's factors in it."""
        return to_float32(arrays["scale"])

    def zero_point(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes) -> np.ndarray | None:
        """The grid of zero points as float32, None where there is none."""
        return None

    def block(self, shape: Shape, grid: Shape) -> tuple[int, ...]:
        """The extent of a block along each dim of matrices that a grid of this shape is for."""
        return tuple(ceil_div(size, max(count, 1)) for size, count in zip(shape, grid, strict=True))

    def boxes(self, box: Box, shape: Shape, stored: Shapes) -> dict[str, Box]:
        found = {"values": self.value_box(box, shape, stored)}
        for role in self.grids:
            if role in stored:
                found[role] = self.grid_box(box, shape, stored[role])
        return found

    def grid_box(self, box: Box, shape: Shape, stored: Shape) -> Box:
        """The box of a stored grid that the blocks of `box` are in."""
        block = self.block(shape, grid_shape(stored, shape))
        return tuple(
            (0, size) if dim is None or size == 1 else (box[dim][0] // block[dim], ceil_div(box[dim][1], block[dim]))
            for dim, size in zip(_dims(stored, shape), stored, strict=True)
        )

    def values_as_stored(self, shape: Shape) -> bool:
        return True

    def packed(self, role: str, arrays: Arrays, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        if role == "values":
            return self.packed_values(arrays["values"], box, shape, stored)
        grid = self.packed_grid(role, arrays[self.packed_from[role][0]])
        grid = grid.reshape(grid_shape(grid.shape, shape))
        lead = extent(box[:-2])
        # One entry may be for a whole stack of matrices.
        return grid if grid.shape[:-2] == lead else np.broadcast_to(grid, (*lead, *grid.shape[-2:]))

    def packed_values(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        """The packed numbers in `box`, of what `value_box` says; where they are others, `values_as_stored` says so."""
        return array

    def packed_grid(self, role: str, array: np.ndarray) -> np.ndarray:
        """The entries of a packed grid, of the shape of the stored one."""
        return array

    def values(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        numbers = self.codes(arrays["values"], box, shape, stored, out)
        rows, columns = self.block(shape, grid_shape(stored["scale"], shape))[-2:]
        zeros = self.zero_point(arrays, box, shape, stored)
        if zeros is not None:
            apply_grid(np.subtract, numbers, zeros, box, (rows, columns))
        scale = self.scale(arrays, shape)
        apply_grid(np.multiply, numbers, scale.reshape(grid_shape(scale.shape, shape)), box, (rows, columns))
        return numbers


def grid_shape(stored: Shape, shape: Shape) -> Shape:
    """The shape with as many dims as the matrices that a stored grid is to be seen in.

    >>> grid_shape((8,), (8, 64)), grid_shape((), (8, 64)), grid_shape((2, 1, 4, 1), (256, 512))
    ((8, 1), (1, 1), (2, 4))
    """
    counts = [1] * len(shape)
    for dim, size in zip(_dims(stored, shape), stored, strict=True):
        if dim is not None:
            counts[dim] = size
    return tuple(counts)


def _dims(stored: Shape, shape: Shape) -> tuple[int | None, ...]:
    """For each dim of a stored grid the dim of the matrices that it goes along; None for one of a single entry."""
    if math.prod(stored) == 1:
        return (None,) * len(stored)
    if len(stored) == 4 and len(shape) == 2:
        return (0, None, 1, None)
    return tuple(range(len(stored)))


def groups_of(group_size: int | None, inputs: int) -> int:
    """Groups of so many inputs: one where their size is None, or more than there are inputs."""
    return 1 if group_size is None else max(inputs // group_size, 1)


def group_block(group_size: int | None, shape: Shape) -> tuple[int, int | None]:
    """The outputs and inputs of a packed form that share a scale, where each output has one for each group of inputs."""
    return 1, None if group_size is None or group_size >= shape[-1] else group_size


def check_group_size(group_size: int | None, shape: Shape) -> str | None:
    """The reason why groups do not fill the inputs of matrices; None if they do."""
    if group_size is None or shape[-1] < group_size or shape[-1] % group_size == 0:
        return None
    return f"a group size of {group_size} does not divide the {shape[-1]} inputs of its matrices"
