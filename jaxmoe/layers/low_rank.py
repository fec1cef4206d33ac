r"""Products with low-rank adapters that stay apart from the matrices they belong to (LoRA, Hu et al. 2021).

Row i, which has chosen adapter l, gets :math:`y_i = W x_i + B_l A_l x_i` with the scale in B; a row that has chosen none
gets :math:`W x_i`. Letters here, beside the common ones of docs/concepts/letters.md: L adapters that there is room for, r
rank.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxmoe.numerics import sum_dtype

FACTOR_ENDINGS = ("_lora_a", "_lora_b")
"""Endings that the names of its adapters' factors have, behind the name of a parameter."""


class AdaptedMatrix(NamedTuple):
    """A matrix and the factors of its adapters; also holds their partition specs.

    Attributes:
        base: [N, K], plain or packed.
        a: [L, r, K].
        b: [N, L, r].
        adapter_ids: int32 [B], adapter of each row of a batch, -1 for none.
    """

    base: Any
    a: Any
    b: Any
    adapter_ids: Any


def low_rank_product(x: jax.Array, matrix: AdaptedMatrix) -> jax.Array:
    """B_l A_l x for each row of x [B, ..., K] and its adapter l, zeros for rows without one; [B, ..., N], not rounded.

    All adapters' A are multiplied with, and what is not the row's is made zero before B: L·r is small beside N and K, and
    factors that were gathered for each row would be stored.
    """
    L = matrix.a.shape[0]
    dtype = sum_dtype(x.dtype)
    h_BLr = jnp.einsum("b...k,lrk->b...lr", x, matrix.a, preferred_element_type=dtype)
    own_BL = matrix.adapter_ids[:, None] == jnp.arange(L, dtype=jnp.int32)[None]
    own_BL1 = own_BL.reshape(len(own_BL), *[1] * (x.ndim - 2), L, 1)
    h_BLr = jnp.where(own_BL1, h_BLr, 0).astype(x.dtype)
    return jnp.einsum("b...lr,nlr->b...n", h_BLr, matrix.b, preferred_element_type=dtype)


def factor_partitions(spec: PartitionSpec, ndim: int) -> tuple[PartitionSpec, PartitionSpec]:
    """Partition specs of the factors A and B of a matrix [N, K], or of a stack [P, ..., K] of them, from its own.

    A is split as K is, and B as the outputs are; both lie like the stack's slots.
    """
    axes: list[Any] = [*spec, *[None] * (ndim - len(spec))]
    *outs, inner = axes
    if ndim == 2:
        return PartitionSpec(None, None, inner), PartitionSpec(outs[0], None, None)
    return PartitionSpec(outs[0], None, None, inner), PartitionSpec(outs[0], None, *outs[1:], None)
