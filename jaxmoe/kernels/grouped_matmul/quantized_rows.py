"""Rows that are rounded to 8 bits before a product, as some checkpoints ask of activations.

x ≈ values · scales, with a scale for a row, for 128 columns of it, or for all rows of a group. Backends that have no product
of their own for such rows multiply values · scales in float32: the same but for the order of sums.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K], b columns that share
a scale.
"""

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.kernels.grouped_matmul.combine import Combine
from jaxmoe.kernels.grouped_matmul.quantized import Matrices

if TYPE_CHECKING:
    from jaxmoe.kernels.grouped_matmul.backends import Kernels


class RowFormat(NamedTuple):
    """Form that rows are rounded to.

    Attributes:
        dtype: dtype of the values.
        block: columns that share a scale; None for all of a row.
        static: flag that scales are given, one a group; otherwise they follow from the largest number.
    """

    dtype: jnp.dtype
    block: int | None = None
    static: bool = False

    @property
    def largest(self) -> float:
        """The largest number of `dtype` whose negative is one too."""
        return float(jnp.finfo(self.dtype).max) if self.dtype == jnp.float8_e4m3fn else float(jnp.iinfo(self.dtype).max)


_FLOAT8, _INT8 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.int8)
# By the names that `grouped_matmul` and `expert_mlp` take; "none" leaves rows as they are.
ROW_FORMATS: dict[str, RowFormat | None] = {
    "none": None,
    "fp8_token": RowFormat(_FLOAT8),
    "fp8_block": RowFormat(_FLOAT8, block=128),
    "fp8_static": RowFormat(_FLOAT8, static=True),
    "int8_token": RowFormat(_INT8),
    "int8_static": RowFormat(_INT8, static=True),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedRows:
    """Rows x ≈ values · scales; a pytree of its arrays.

    Attributes:
        values: float8_e4m3fn or int8 [R, K].
        scales: float32 [R, ceil(K / b)].
        block: b, columns that share a scale; the last may be fewer.
    """

    values: jax.Array
    scales: jax.Array
    block: int = dataclasses.field(metadata={"static": True})


def quantize_rows(x_RK: jax.Array, format: str, *, scales_R: jax.Array | None = None) -> QuantizedRows:
    """Round rows to 8 bits: values = x / scales, to nearest and even, within the range of their dtype.

    A dynamic scale is max |x| / 448 for float8_e4m3fn, or / 127 for int8, over a row or over each 128 columns of it, and
    never 0. XLA divides by multiplying with an inverse on some devices, so a number halfway between two may go either way.

    Args:
        x_RK: rows, of any floating dtype; computed in float32.
        format: name in `ROW_FORMATS` other than "none".
        scales_R: float32, the scale of each row, of a static format.

    Raises:
        ValueError: no such format, or scales missing or not asked for.

    >>> rows = quantize_rows(jnp.array([[1.0, -127.0, 3.4]]), "int8_token")
    >>> rows.values.tolist(), rows.scales.tolist()
    ([[1, -127, 3]], [[1.0]])
    """
    form = check_row_format(format, scales_R is not None)
    if form is None:
        raise ValueError(f"format must be one of {[name for name in ROW_FORMATS if name != 'none']}; got {format!r}.")
    (R, K), block = x_RK.shape, form.block or max(x_RK.shape[1], 1)
    x_RK = x_RK.astype(jnp.float32)
    blocks = jnp.pad(x_RK, ((0, 0), (0, -K % block))).reshape(R, -(-K // block), block)
    if scales_R is None:
        scales = jnp.maximum(jnp.max(jnp.abs(blocks), axis=2, initial=0) / form.largest, jnp.finfo(jnp.float32).tiny)
    else:
        scales = jnp.broadcast_to(scales_R.astype(jnp.float32)[:, None], blocks.shape[:2])
    scaled = jnp.clip(blocks / scales[..., None], -form.largest, form.largest)
    if not jnp.issubdtype(form.dtype, jnp.floating):
        scaled = jnp.round(scaled)
    values = scaled.astype(form.dtype).reshape(R, blocks.shape[1] * block)[:, :K]
    return QuantizedRows(values=values, scales=scales, block=block)


def check_row_format(name: str, has_scales: bool) -> RowFormat | None:
    """The form of a name in `ROW_FORMATS`.

    Raises:
        ValueError: no such name, or scales missing or not asked for.
    """
    if name not in ROW_FORMATS:
        raise ValueError(f"activations must be one of {list(ROW_FORMATS)}; got {name!r}. Name one of these.")
    form = ROW_FORMATS[name]
    static = form is not None and form.static
    if has_scales != static:
        names = [other for other, form in ROW_FORMATS.items() if form and form.static]
        found, way_out = ("with", "Leave them out") if has_scales else ("without", "Give them")
        raise ValueError(
            f"scales are given with activations {' and '.join(names)}, and with no others; got {name!r} {found} them. "
            f"{way_out}, or name another."
        )
    return form


def groups_of_rows(R: int, group_sizes_G: jax.Array) -> jax.Array:
    """int32 [R], the group of each row; any where none owns it."""
    groups_G = jnp.arange(len(group_sizes_G), dtype=jnp.int32)
    return jnp.repeat(groups_G, group_sizes_G, total_repeat_length=R)


@jax.custom_jvp
def _straight_through(x_RK: jax.Array, rounded_RK: jax.Array) -> jax.Array:
    """`rounded_RK`, with the gradient that `x_RK` would have in its place."""
    del x_RK
    return rounded_RK


@_straight_through.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


def round_rows(
    x_RK: jax.Array, format: str, group_sizes_G: jax.Array, input_scales_G: jax.Array | None = None
) -> jax.Array:
    """values · scales of `quantize_rows`, float32 [R, K]; in a gradient as if nothing were rounded."""
    rows = quantize_rows(x_RK, format, scales_R=scales_of_rows(x_RK.shape[0], group_sizes_G, input_scales_G))
    spread = jnp.repeat(rows.scales, rows.block, axis=1)[:, : x_RK.shape[1]]
    rounded = jax.lax.stop_gradient(rows.values.astype(jnp.float32) * spread)
    return _straight_through(x_RK.astype(jnp.float32), rounded)


def scales_of_rows(R: int, group_sizes_G: jax.Array, input_scales_G: jax.Array | None) -> jax.Array | None:
    """The static scale of each row, by its group; None if there are none."""
    return None if input_scales_G is None else input_scales_G[groups_of_rows(R, group_sizes_G)]


@dataclasses.dataclass(frozen=True)
class OnRoundedRows:
    """A backend's products of rows that are rounded before each; in float32, so of packed matrices only.

    Attributes:
        kernels: the backend, as `Kernels` says, which this is too.
        activations: name in `ROW_FORMATS`.
        input_scales: float32, of static activations: [G], or [p, 2] for the rows of both products of an MLP.
    """

    kernels: "Kernels"
    activations: str
    input_scales: jax.Array | None = None

    def grouped_matmul(
        self,
        lhs_RK: jax.Array,
        rhs_GNK: Matrices,
        group_sizes_G: jax.Array,
        *,
        out_dtype: jnp.dtype,
        device_kind: str | None = None,
    ) -> jax.Array:
        """out[r] = rhs[g(r)] @ round(lhs[r])."""
        rows_RK = round_rows(lhs_RK, self.activations, group_sizes_G, self.input_scales)
        return self.kernels.grouped_matmul(
            rows_RK, rhs_GNK, group_sizes_G, out_dtype=out_dtype, device_kind=device_kind
        )

    def expert_mlp(
        self,
        x_RD: jax.Array,
        w_up_pND: Matrices,
        w_down_pDF: Matrices,
        group_sizes_p: jax.Array,
        *,
        b_up_pN: jax.Array | None,
        b_down_pD: jax.Array | None,
        combine: Combine,
        out_dtype: jnp.dtype,
        device_kind: str | None = None,
    ) -> jax.Array:
        """y = W_down[g] @ round(combine(W_up[g] @ round(x) + b_up[g])) + b_down[g], as two products."""
        group_R, wide = groups_of_rows(x_RD.shape[0], group_sizes_p), jnp.dtype(jnp.float32)

        def affine(rows: jax.Array, matrices: Matrices, biases: jax.Array | None, number: int) -> jax.Array:
            scales = None if self.input_scales is None else self.input_scales[:, number]
            product = dataclasses.replace(self, input_scales=scales).grouped_matmul
            y = product(rows, matrices, group_sizes_p, out_dtype=wide, device_kind=device_kind)
            return y if biases is None else y + biases[group_R].astype(wide)

        h_RF = combine(affine(x_RD, w_up_pND, b_up_pN, 0)).astype(x_RD.dtype)
        owned_R1 = (jnp.arange(len(x_RD), dtype=jnp.int32) < jnp.sum(group_sizes_p, dtype=jnp.int32))[:, None]
        return jnp.where(owned_R1, affine(h_RF, w_down_pDF, b_down_pD, 1), 0).astype(out_dtype)
