"""Rows that are rounded to 8 bits before a product, as some checkpoints ask of activations.

x ≈ values · scales, with a scale for a row, for 128 columns of it, or for all rows of a group. Backends that have no product
of their own for such rows multiply values · scales in float32: the same but for the order of sums. Where devices share the
columns of a row, a scale is that of the whole row or block, so that it is the same on every mesh.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K], b columns that share
a scale.
"""

import dataclasses
import math
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
        powers: flag that those which follow are powers of two, the least with which nothing is cut off.
    """

    dtype: jnp.dtype
    block: int | None = None
    static: bool = False
    powers: bool = False

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
    "fp8_block_e8m0": RowFormat(_FLOAT8, block=128, powers=True),
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


def quantize_rows(
    x_RK: jax.Array, format: str, *, scales_R: jax.Array | None = None, split_over: tuple[str, ...] = ()
) -> QuantizedRows:
    """Round rows to 8 bits: values = x / scales, to nearest and even, within the range of their dtype.

    A dynamic scale is max |x| / 448 for float8_e4m3fn, or / 127 for int8, over a row or over each 128 columns of it, and
    never 0; of "fp8_block_e8m0" the power of two at or above that. XLA divides by multiplying with an inverse on some
    devices, so a number halfway between two may go either way.

    Args:
        x_RK: rows, of any floating dtype; computed in float32.
        format: name in `ROW_FORMATS` other than "none".
        scales_R: float32, the scale of each row, of a static format.
        split_over: axes of the `shard_map` over which the columns of a row are split, each device holding as many. Rows and
            blocks are those of all of them; a block that ends inside of a device's columns makes the result's smaller.

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
    if split_over and form.block is not None and K:
        block = math.gcd(form.block, K)
    x_RK = x_RK.astype(jnp.float32)
    blocks = jnp.pad(x_RK, ((0, 0), (0, -K % block))).reshape(R, -(-K // block), block)
    if scales_R is None:
        largest = jnp.max(jnp.abs(jax.lax.stop_gradient(blocks)), axis=2, initial=0)
        largest = _over_devices(largest, block, form.block, split_over)
        scales = jnp.maximum(largest / form.largest, jnp.finfo(jnp.float32).tiny)
        scales = _power_of_two(scales) if form.powers else scales
    else:
        scales = jnp.broadcast_to(scales_R.astype(jnp.float32)[:, None], blocks.shape[:2])
    scaled = jnp.clip(blocks / scales[..., None], -form.largest, form.largest)
    if not jnp.issubdtype(form.dtype, jnp.floating):
        scaled = jnp.round(scaled)
    values = scaled.astype(form.dtype).reshape(R, blocks.shape[1] * block)[:, :K]
    return QuantizedRows(values=values, scales=scales, block=block)


def _over_devices(largest_RB: jax.Array, block: int, wanted: int | None, split_over: tuple[str, ...]) -> jax.Array:
    """The largest numbers of this device's blocks as those of the rows or of the wanted blocks that they are parts of."""
    if not split_over or block == wanted:
        return largest_RB
    if wanted is None:
        return jax.lax.pmax(largest_RB, split_over)
    here, each = largest_RB.shape[1], wanted // block
    everywhere = jax.lax.all_gather(largest_RB, split_over, axis=1, tiled=True)
    padded = jnp.pad(everywhere, ((0, 0), (0, -everywhere.shape[1] % each)))
    of_wanted = jnp.max(padded.reshape(len(padded), -1, each), axis=2)
    own = jax.lax.axis_index(split_over) * here + jnp.arange(here, dtype=jnp.int32)
    return jnp.take(of_wanted, own // each, axis=1)


def _power_of_two(scales: jax.Array) -> jax.Array:
    """The least power of two that is no less than a normal positive number."""
    bits = jax.lax.bitcast_convert_type(scales, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + (2**23 - 1)) & ~jnp.int32(2**23 - 1), jnp.float32)


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
    x_RK: jax.Array,
    format: str,
    group_sizes_G: jax.Array,
    input_scales_G: jax.Array | None = None,
    split_over: tuple[str, ...] = (),
) -> jax.Array:
    """values · scales of `quantize_rows`, float32 [R, K]; in a gradient as if nothing were rounded."""
    scales_R = scales_of_rows(x_RK.shape[0], group_sizes_G, input_scales_G)
    rows = quantize_rows(x_RK, format, scales_R=scales_R, split_over=split_over)
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
        split_over: mesh axes over which columns are split, of rows, or of h in an MLP.
    """

    kernels: "Kernels"
    activations: str
    input_scales: jax.Array | None = None
    split_over: tuple[str, ...] = ()

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
        rows_RK = round_rows(lhs_RK, self.activations, group_sizes_G, self.input_scales, self.split_over)
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
            split_over = self.split_over if number else ()
            product = dataclasses.replace(self, input_scales=scales, split_over=split_over).grouped_matmul
            y = product(rows, matrices, group_sizes_p, out_dtype=wide, device_kind=device_kind)
            return y if biases is None else y + biases[group_R].astype(wide)

        h_RF = combine(affine(x_RD, w_up_pND, b_up_pN, 0)).astype(x_RD.dtype)
        owned_R1 = (jnp.arange(len(x_RD), dtype=jnp.int32) < jnp.sum(group_sizes_p, dtype=jnp.int32))[:, None]
        return jnp.where(owned_R1, affine(h_RF, w_down_pDF, b_down_pD, 1), 0).astype(out_dtype)
