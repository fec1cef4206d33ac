"""The product of activations with a matrix, plain or packed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxmoe.kernels.grouped_matmul import QuantizedStack, grouped_matmul
from jaxmoe.layers.low_rank import AdaptedMatrix, low_rank_product
from jaxmoe.layers.weights import RoundingStack, Weight


@dataclasses.dataclass(frozen=True)
class Linear:
    """x @ weightᵀ as a layer computes it.

    Attributes:
        mesh: mesh that the layer is on.
        kernels: backend of `jaxmoe.kernels.grouped_matmul` for packed matrices, or "auto".
    """

    mesh: Mesh
    kernels: str = "auto"

    def __call__(self, x: jax.Array, weight: Weight | AdaptedMatrix, out_dtype: DTypeLike | None = None) -> jax.Array:
        """Multiply, [..., N]; a packed matrix is decoded as it is multiplied with, its inputs rounded where it says so.

        Args:
            x: [..., K].
            weight: [N, K], of x's dtype or packed, or one with adapters, where x is [B, ..., K].
            out_dtype: dtype of the sums and of the result; None for x's.
        """
        if isinstance(weight, AdaptedMatrix):
            y = self(x, weight.base, out_dtype)
            return y + low_rank_product(x, weight).astype(y.dtype)
        rounding: dict[str, Any] = {}
        if isinstance(weight, RoundingStack):
            rounding = {"activations": weight.activations, "split_over": weight.split_over}
            if weight.input_scales is not None:
                rounding["input_scales_G"] = weight.input_scales[None]
            weight = weight.stack
        if not isinstance(weight, QuantizedStack):
            return jnp.einsum("...k,nk->...n", x, weight, preferred_element_type=out_dtype)
        rows = x.reshape(-1, x.shape[-1])
        y = grouped_matmul(
            rows,
            jax.tree.map(lambda array: array[None], weight),
            jnp.array([len(rows)], jnp.int32),
            out_dtype=out_dtype,
            backend=self.kernels,
            device_kind=self.mesh.devices.flat[0].device_kind,
            **rounding,
        )
        return y.reshape(*x.shape[:-1], -1)
