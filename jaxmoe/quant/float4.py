"""4-bit floats, two a byte, with a scale for each group of inputs: what NVFP4 and MXFP4 have in common."""

from collections.abc import Mapping

import numpy as np

from jaxmoe.quant.base import Arrays, Box, Shape, Shapes, ceil_div
from jaxmoe.quant.codes import FLOAT4, exponents_to_float32, nibbles_to_float32, not_zero, to_float32
from jaxmoe.quant.grid import GridFormat, check_group_size, grid_shape, group_block, groups_of
from jaxmoe.quant.packing import Packing


class Float4Groups(GridFormat):
    """Two e2m1 numbers a byte along K, the even one in the low half, and a scale for each group of inputs."""

    group_size: int

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        *lead, K = shape
        return ((*lead, K // 2),) if role == "values" else ((*lead, groups_of(self.group_size, K)),)

    def shape_of(self, stored: Shapes) -> Shape | None:
        *lead, width = stored["values"]
        return (*lead, 2 * width)

    def check_shape(self, shape: Shape) -> str | None:
        return super().check_shape(shape) or check_group_size(self.group_size, shape)

    def value_box(self, box: Box, shape: Shape, stored: Shapes) -> Box:
        *lead, (start, stop) = box
        return (*lead, (start // 2, ceil_div(stop, 2)))

    def values_as_stored(self, shape: Shape) -> bool:
        return shape[-1] % 2 == 0

    def packed_values(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        return array.view(np.uint8)

    def codes(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        start, stop = box[-1]
        return nibbles_to_float32(array, FLOAT4, out)[..., start % 2 : start % 2 + stop - start]


class Nvfp4Groups(Float4Groups):
    """W[n, k] = e2m1[n, k] · (scale[n, k // 16] · factor), the product in brackets rounded to float32."""

    grids = ("scale", "global_scale")

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        if role != "global_scale":
            return super().shapes(role, shape)
        lead = shape[:-2]
        return ((), (1,), *([lead, (*lead, 1), (*lead, 1, 1)] if lead else []))

    def scale(self, arrays: Arrays, shape: Shape) -> np.ndarray:
        scale, factor = to_float32(arrays["scale"]), arrays["global_scale"].astype(np.float32)
        return self.rescale(scale, factor.reshape(grid_shape(factor.shape, shape)))

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing | None:
        block = group_block(self.group_size, shape)
        return Packing("nvfp4", block, "float8_e4m3fn", matrix_scales=True) if dtypes["scale"] == "F8_E4M3" else None

    def packed_grid(self, role: str, array: np.ndarray) -> np.ndarray:
        return array if role == "scale" else self.rescale(np.float32(1), array.astype(np.float32))

    def rescale(self, scale: np.ndarray | np.float32, global_scale: np.ndarray) -> np.ndarray:
        """Scales of groups with that of the tensor applied."""
        return scale * global_scale

    def scales(self, arrays: Arrays) -> dict[str, np.ndarray]:
        # A group's own scale is rounded to zero where its numbers are far below the tensor's largest.
        found = super().scales(arrays)
        return {role: to_float32(array) if role == "global_scale" else not_zero(array) for role, array in found.items()}


class Mxfp4Groups(Float4Groups):
    """W[n, k] = e2m1[n, k] · 2^(scale[n, k // 32] - 127)."""

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing | None:
        block = group_block(self.group_size, shape)
        return Packing("mxfp4", block, "uint8") if dtypes["scale"] in ("U8", "F8_E8M0") else None

    def packed_grid(self, role: str, array: np.ndarray) -> np.ndarray:
        return array.view(np.uint8)

    def scale(self, arrays: Arrays, shape: Shape) -> np.ndarray:
        return exponents_to_float32(arrays["scale"])

    def scales(self, arrays: Arrays) -> dict[str, np.ndarray]:
        return {role: exponents_to_float32(array) for role, array in super().scales(arrays).items()}
