"""What `jax.lax.ragged_all_to_all` does, by an all_gather, for devices that do not have it."""

import jax
import jax.numpy as jnp


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Device i's rows ``operand[input_offsets[j] : + send_sizes[j]]`` to ``output[output_offsets[j] : ]`` of device j.

    A size that does not agree with its partner's poisons the result, as it would a real exchange.
    """
    me = jax.lax.axis_index(axis_name)
    operands, starts, sizes, targets = (
        jax.lax.all_gather(each, axis_name) for each in (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(len(output))
    for source in range(len(send_sizes)):
        start, size, target = starts[source, me], sizes[source, me], targets[source, me]
        here = (row >= target) & (row < target + size)
        arriving = operands[source][jnp.clip(row - target + start, 0, len(operand) - 1)]
        shape = (-1,) + (1,) * (operand.ndim - 1)
        output = jnp.where(here.reshape(shape), arriving, output)
        # NaN, also in bytes that are float8_e4m3fn.
        poison = jnp.array(jnp.nan if jnp.issubdtype(output.dtype, jnp.floating) else 255, output.dtype)
        output = jnp.where(size == recv_sizes[source], output, poison)
    return output
