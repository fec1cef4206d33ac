"""The products of a gradient by the kernels for Hopper, and what they are not made for.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K].
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.blackwell_tiles import is_blackwell
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.gradient_kernel import (
    choose_gradient_tiles,
    multiply_by_columns,
    sum_outer_products,
)
from jaxmoe.kernels.grouped_matmul.quantized import Matrices, QuantizedStack


def missing_gradient(rows_RK: jax.Array, *stacks: Matrices, device_kind: str | None = None) -> str:
    """The reason why the gradient of products with those matrices is not the kernel's; empty where it is.

    Args:
        rows_RK: rows of the first product.
        stacks: matrices [G, N, K] of the products.
        device_kind: `jax.Device.device_kind` of the GPU that they run on; None for Hopper.
    """
    if any(isinstance(stack, QuantizedStack) for stack in stacks):
        return "there is no kernel of gradients by packed matrices"
    if rows_RK.dtype != jnp.bfloat16:
        # A gradient that is rounded to float16 on the way may be beyond its range.
        return f"the kernel of gradients multiplies rows of bfloat16; got {rows_RK.dtype}"
    if is_blackwell(device_kind):
        return f"there is no kernel of gradients for Blackwell ({device_kind})"
    if 0 in rows_RK.shape or any(0 in stack.shape for stack in stacks):
        return "there is nothing to multiply"
    try:
        for stack in stacks:
            choose_gradient_tiles(*stack.shape)
    except NotImplementedError as refusal:
        return str(refusal)
    return ""


@dataclasses.dataclass(frozen=True)
class HopperProducts:
    """`Products` by the kernels for Hopper.

    Attributes:
        multiply: function that is `by_rows`, the product of the forward pass.
        blocks: number of multiprocessors.
        interpret: flag that the kernels run in the interpreter.
    """

    multiply: Callable[..., jax.Array]
    blocks: int
    interpret: bool

    def by_rows(
        self, x_RK: jax.Array, w_GNK: jax.Array, b_GN: jax.Array | None, group_sizes_G: jax.Array, out_dtype: Any
    ) -> jax.Array:
        """W[g(r)] x[r] + b[g(r)]."""
        return self.multiply(x_RK, w_GNK, b_GN, group_sizes_G, out_dtype)

    def by_columns(self, dy_RN: jax.Array, w_GNK: jax.Array, group_sizes_G: jax.Array, out_dtype: Any) -> jax.Array:
        """dy[r] W[g(r)]."""
        R, tiles = len(dy_RN), choose_gradient_tiles(*w_GNK.shape)
        options = {"blocks": self.blocks, "interpret": self.interpret}
        return multiply_by_columns(
            _aligned(dy_RN), w_GNK, group_sizes_G.astype(jnp.int32), tiles, jnp.dtype(out_dtype), **options
        )[:R]

    def outer(self, dy_RN: jax.Array, x_RK: jax.Array, group_sizes_G: jax.Array, out_dtype: Any) -> jax.Array:
        """Σ dy[r]ᵀ x[r] over the rows of each group."""
        tiles = choose_gradient_tiles(len(group_sizes_G), dy_RN.shape[1], x_RK.shape[1])
        options = {"blocks": self.blocks, "interpret": self.interpret}
        arrays = (_aligned(dy_RN), _aligned(x_RK), group_sizes_G.astype(jnp.int32))
        return sum_outer_products(*arrays, tiles, jnp.dtype(out_dtype), **options)


def _aligned(rows_RK: jax.Array) -> jax.Array:
    """The rows, and so many more that there are a multiple of 8."""
    return jnp.pad(rows_RK, ((0, -len(rows_RK) % ALIGNMENT), (0, 0)))
