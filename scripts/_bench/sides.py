"""Who takes part: every backend of jaxmoe, and what others offer for the same operation.

Each multiplies the very same arrays; torch sees jax's through DLPack. Group sizes are on the device, and torch gets its
offsets ready made. A side that cannot do a case says so by an exception.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.kernels.grouped_matmul import BACKENDS, check_backend, expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.backends import GPU_BACKENDS
from scripts._bench.cases import Case
from scripts._bench.inputs import Variant, free_memory

# Does every call of a turn, waits for the last one and returns the first one's result.
Turn = Callable[[], Any]


class Side(NamedTuple):
    """One way to do the operations.

    Attributes:
        name: in tables and after --backends.
        prepare: compiles for a case; raises where the side cannot do it.
    """

    name: str
    prepare: Callable[[Case, Sequence[Variant]], Turn]


def all_sides() -> list[Side]:
    """In the order of the tables. Those that are not installed, or cannot run on this device, refuse every case."""
    ours = [name for name in [*BACKENDS, *GPU_BACKENDS] if name != "reference"]
    return [
        *(Side(name, partial(_prepare_backend, name)) for name in ours),
        Side("lax_in_out", partial(_prepare_ragged_dot, _lax_ragged_dot)),
        Side("tokamax_mosaic", partial(_prepare_tokamax, "mosaic")),
        Side("tokamax_triton", partial(_prepare_tokamax, "triton")),
        Side("torch_grouped_mm", partial(_prepare_torch, "grouped_mm")),
        Side("torch_mm_loop", partial(_prepare_torch, "mm_loop")),
    ]


SIDES_HELP = """\
  portable, mosaic_gpu, xla_ragged_dot, ...   jaxmoe's backends, by their names
  lax_in_out          jax.lax.ragged_dot with matrices stored (in, out), which spares it xla_ragged_dot's copy
  tokamax_mosaic, tokamax_triton   tokamax.ragged_dot, matrices stored (in, out)
  torch_grouped_mm    torch's grouped_mm with matrices (out, in), as transformers calls it
  torch_mm_loop       torch.mm for each expert that has rows"""


# --- jax


def _prepare_backend(name: str, case: Case, variants: Sequence[Variant]) -> Turn:
    device = _device(variants)
    check_backend(name, device)
    options = {"backend": name, "device_kind": device.device_kind}

    def apply(rows: jax.Array, sizes_G: jax.Array, *matrices: jax.Array) -> jax.Array:
        if case.operation != "mlp":
            return grouped_matmul(rows, *matrices, sizes_G, **options)
        up, down = matrices
        return expert_mlp(rows, up.reshape(up.shape[0], 2, -1, up.shape[2]), down, sizes_G, **options)

    return jax_turn(apply, [(v.rows, v.group_sizes, *v.layer.matrices(case.operation)) for v in variants], device)


# From rows [R, K], matrices [G, K, N] and group sizes to float32 [R, N].
RaggedDot = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _lax_ragged_dot(rows: jax.Array, matrices_GKN: jax.Array, sizes_G: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(rows, matrices_GKN, sizes_G, preferred_element_type=jnp.float32)


def _prepare_ragged_dot(ragged_dot: RaggedDot, case: Case, variants: Sequence[Variant]) -> Turn:
    def apply(rows: jax.Array, sizes_G: jax.Array, *matrices_GKN: jax.Array) -> jax.Array:
        out = ragged_dot(rows, matrices_GKN[0], sizes_G)
        if case.operation == "mlp":
            gate, up = jnp.split(out, 2, axis=-1)
            out = ragged_dot((jax.nn.silu(gate) * up).astype(rows.dtype), matrices_GKN[1], sizes_G)
        return out.astype(rows.dtype)

    return jax_turn(
        apply, [(v.rows, v.group_sizes, *v.layer.transposed(case.operation)) for v in variants], _device(variants)
    )


def _prepare_tokamax(implementation: str, case: Case, variants: Sequence[Variant]) -> Turn:
    _need("tokamax")
    import tokamax

    def ragged_dot(rows: jax.Array, matrices_GKN: jax.Array, sizes_G: jax.Array) -> jax.Array:
        return tokamax.ragged_dot(
            rows, matrices_GKN, sizes_G, preferred_element_type=jnp.float32, implementation=implementation
        )

    return _prepare_ragged_dot(ragged_dot, case, variants)


def jax_turn(apply: Callable[..., jax.Array], inputs: Sequence[tuple[jax.Array, ...]], device: jax.Device) -> Turn:
    """`apply` to each of the inputs, one after the other.

    On the CPU each is a call of its own. On a GPU all are one program, for a call costs the host more than some of these
    operations take; a barrier keeps them apart and in order.

    Raises:
        MemoryError: the program needs more memory than there is.
    """

    def chain(inputs: Sequence[tuple[jax.Array, ...]]) -> list[jax.Array]:
        outs: list[jax.Array] = []
        for first, *rest in inputs:
            if outs:
                first, outs[-1] = jax.lax.optimization_barrier((first, outs[-1]))
            outs.append(jax.jit(apply)(first, *rest))
        return outs

    one_by_one = device.platform == "cpu"
    compiled = jax.jit(apply).lower(*inputs[0]).compile() if one_by_one else jax.jit(chain).lower(inputs).compile()
    _check_memory(compiled, device)

    def turn() -> jax.Array:
        outs = [jax.block_until_ready(compiled(*one)) for one in inputs] if one_by_one else compiled(inputs)
        return jax.block_until_ready(outs)[0]

    return turn


def _check_memory(compiled: Any, device: jax.Device) -> None:
    memory = compiled.memory_analysis()
    needed, free = memory.temp_size_in_bytes + memory.output_size_in_bytes, free_memory(device)
    if needed > free:
        raise MemoryError(f"needs {needed / 1e9:.1f} GB beside its inputs, and {free / 1e9:.1f} GB are free")


def _device(variants: Sequence[Variant]) -> jax.Device:
    (device,) = variants[0].rows.devices()
    return device


# --- torch


def _prepare_torch(product: str, case: Case, variants: Sequence[Variant]) -> Turn:
    _need("torch")
    from scripts._bench import torch_products

    return torch_products.prepare(getattr(torch_products, product), case, variants)


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NotImplementedError(f"{package} is not installed")
