"""Dispatch backends as compiled programs over simulated devices: routing is data, so one program serves every routing."""

import dataclasses
from collections import Counter
from functools import cache, cached_property, partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoe.dispatch import (
    DISPATCHES,
    Buffers,
    Dispatch,
    DispatchLayout,
    DispatchShape,
    DispatchStats,
    Experts,
    queues,
)
from jaxmoe.kernels.grouped_matmul import expert_mlp
from jaxmoe.mesh import AXES
from jaxmoe.placement import ExpertPlacement
from tests.support.hlo import groups_along
from tests.support.meshes import MESH_SHAPES, mesh_of
from tests.support.oracle import silu
from tests.support.simulated_ragged import ragged_all_to_all

D, F, E = 16, 8, 11
# So small that most routings take several rounds and trips.
SMALL = Buffers(row_headroom=0.3, row_deviations=0, min_rows=1, pair_headroom=0.3, min_pairs=1)

# Every mesh with every choice of expert axes that differs on it.
LAYOUTS = [
    (shape, axes)
    for shape in MESH_SHAPES
    for axes in [("ep",), ("ep", "tp"), ("dp", "ep")]
    if axes == ("ep",) or shape[AXES.index(axes[0] if axes[1] == "ep" else axes[1])] > 1
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One backend on one mesh with one set of shapes.

    Attributes:
        T: tokens of all devices.
        tight: with `SMALL` buffers.
        replicas: with experts in several slots and padding slots between them.
    """

    backend: str
    mesh_shape: tuple[int, int, int]
    expert_axes: tuple[str, ...]
    T: int = 320
    K: int = 3
    dtype: str = "float32"
    tight: bool = False
    replicas: bool = False
    weights_on_input: bool = False
    wire_dtype: str | None = None

    @cached_property
    def dispatch(self) -> Dispatch:
        return DISPATCHES[self.backend]

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return mesh_of(*self.mesh_shape)

    @cached_property
    def placement(self) -> ExpertPlacement:
        n = int(np.prod([self.mesh.shape[axis] for axis in self.expert_axes]))
        if not self.replicas:
            return ExpertPlacement.round_robin(E, n)
        slots = np.full(2 * 8 * n, -1)
        slots[np.random.default_rng(0).permutation(len(slots))[: E + 3]] = [*range(E), 0, 4, 4]
        return ExpertPlacement(E, n, slots)

    @cached_property
    def layout(self) -> DispatchLayout:
        return DispatchLayout(
            mesh_shape=tuple(self.mesh.shape.items()),
            expert_axes=self.expert_axes,
            partial_axes=() if "tp" in self.expert_axes else ("tp",),
            num_slots=self.placement.num_slots,
            wire_dtype=self.wire_dtype,
            buffers=SMALL if self.tight else Buffers(),
        )

    @cached_property
    def shape(self) -> DispatchShape:
        itemsize = jnp.dtype(self.dtype).itemsize
        return DispatchShape(tokens=self.T, choices=self.K, width=D, itemsize=itemsize, layout=self.layout)

    @cached_property
    def sources(self) -> int:
        """Devices that have tokens of their own."""
        return self.layout.size(self.dispatch.token_axes(self.layout))

    @cached_property
    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x [T, D] and the experts' weights, before they are placed."""
        rng = np.random.default_rng(0)
        return (
            rng.normal(size=(self.T, D)).astype(jnp.dtype(self.dtype)),
            (rng.normal(size=(E, 2, F, D)) / 4).astype(jnp.dtype(self.dtype)),
            (rng.normal(size=(E, D, F)) / 4).astype(jnp.dtype(self.dtype)),
        )

    def stack(self, w: np.ndarray) -> np.ndarray:
        """Experts into physical slots; NaN in padding slots, which nothing may read."""
        return np.concatenate([w, np.full_like(w[:1], np.nan)])[self.placement.slot_to_expert]

    def body(self, x_TD, slots_TK, weights_TK, w_gate_up, w_down):
        """What is compiled: the backend over the mesh."""
        width_axis = "tp" if self.layout.partial_axes else None
        tokens, stacks = P(self.dispatch.token_axes(self.layout)), P(self.expert_axes, None, width_axis)

        @partial(
            jax.shard_map,
            mesh=self.mesh,
            in_specs=(tokens, tokens, tokens, stacks, stacks),
            out_specs=(tokens, DispatchStats(P(), P(*AXES))),
            check_vma=False,
        )
        def run(x_TD, slots_TK, weights_TK, w_gate_up, w_down):
            def apply(stacks, rows, index, sizes, dtype):
                y_RD = expert_mlp(rows, *stacks, sizes, index_R=index, out_dtype=dtype)
                # A kernel leaves anything at places that no slot owns, and nothing may read it.
                return jnp.where((jnp.arange(len(y_RD)) < jnp.sum(sizes))[:, None], y_RD, jnp.nan)

            experts = Experts(apply, (w_gate_up, w_down))
            y_TD, stats = self.dispatch.run(x_TD, slots_TK, weights_TK, experts, self.layout, self.weights_on_input)
            return y_TD, stats._replace(rows_sent_n=stats.rows_sent_n[None, None, None])

        return run(x_TD, slots_TK, weights_TK, w_gate_up, w_down)

    def lower(self, fn):
        """`fn`, jitted and lowered for arguments of `body`'s shapes, with a ragged exchange that runs here."""
        x_TD, *stacks = self.inputs
        shapes = [jax.ShapeDtypeStruct((self.T, self.K), dtype) for dtype in (jnp.int32, jnp.float32)]
        with mock.patch.object(jax.lax, "ragged_all_to_all", ragged_all_to_all):
            return jax.jit(fn).lower(x_TD, *shapes, *map(self.stack, stacks))

    @cached_property
    def compiled(self):
        return self.lower(self.body).compile()

    @cached_property
    def on_devices(self):
        x_TD, *stacks = self.inputs
        formats = self.compiled.input_formats[0]
        return [
            jax.device_put(value, formats[i]) for i, value in ((0, x_TD), *enumerate(map(self.stack, stacks), start=3))
        ]

    def __call__(self, slots_TK: np.ndarray, weights_TK: np.ndarray) -> tuple[np.ndarray, DispatchStats]:
        """Run the compiled program."""
        x_TD, *stacks = self.on_devices
        return jax.device_get(self.compiled(x_TD, slots_TK.astype(np.int32), weights_TK.astype(np.float32), *stacks))

    @cached_property
    def expert_outputs(self) -> np.ndarray:
        """expert_e(x_t) for every pair, in float64, [T, E, D]."""
        x_TD, w_gate_up, w_down = (array.astype(np.float64) for array in self.inputs)
        gate, up = np.einsum("td,ehfd->hetf", x_TD, w_gate_up)
        return np.einsum("etf,edf->ted", silu(gate) * up, w_down)

    def expected(self, ids_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
        """Σ_k weight_k · expert_{id_k}(x), or Σ_k expert_{id_k}(weight_k · x); ids of -1 go nowhere."""
        if self.weights_on_input:
            x_TD, w_gate_up, w_down = (array.astype(np.float64) for array in self.inputs)
            rows_TKD = x_TD[:, None] * weights_TK[:, :, None]
            gate, up = np.einsum("tkd,tkhfd->htkf", rows_TKD, w_gate_up[ids_TK])
            outs_TKD = np.einsum("tkf,tkdf->tkd", silu(gate) * up, w_down[ids_TK])
            return np.where(ids_TK[:, :, None] >= 0, outs_TKD, 0).sum(axis=1)
        outs_TKD = np.take_along_axis(self.expert_outputs, np.maximum(ids_TK, 0)[:, :, None], axis=1)
        return (np.where(ids_TK >= 0, weights_TK, 0)[:, :, None] * outs_TKD).sum(axis=1)

    def slots(self, ids_TK: np.ndarray) -> np.ndarray:
        """A slot for each expert, taking turns over its replicas."""
        turn = np.arange(ids_TK.size).reshape(ids_TK.shape) % self.placement.replica_counts[ids_TK]
        return np.where(ids_TK >= 0, self.placement.expert_to_slots[ids_TK, turn], -1)

    def queue_lengths(self, slots_TK: np.ndarray) -> np.ndarray:
        """Distinct (token, destination) pairs, [sources, n]."""
        n, p = self.layout.num_devices, self.layout.slots_per_device
        goes_Tn = (np.where(slots_TK >= 0, slots_TK // p, -1)[:, :, None] == np.arange(n)).any(axis=1)
        return goes_Tn.reshape(self.sources, -1, n).sum(axis=1)

    def expected_rounds(self, slots_TK: np.ndarray) -> int:
        """The longest queue over C, counted on the host; one round where C holds any line."""
        own = self.T // self.sources
        C = queues.capacity(own, self.K, self.layout)
        return 1 if own == C else -(-int(self.queue_lengths(slots_TK).max()) // C)


@cache
def program(**settings) -> Program:
    """The one program with these settings, so that it is compiled once."""
    return Program(**settings)


def promised(run: Program) -> Counter:
    """The backend's own list, added up as `hlo.collectives` adds up what was compiled.

    Where rounds may be many, devices agree on their number by an all-reduce, and the program holds the collectives of a
    round twice: those of the first, and those of the loop over the others.
    """
    found: Counter = Counter()
    listed = run.dispatch.collectives(run.shape)
    loops = run.dispatch.name == "all_to_all" and any(each.op == "all-reduce" for each in listed)
    for each in listed:
        if each.devices > 1:
            times = 2 if loops and each.op != "all-reduce" else 1
            found[each.op, groups_along(run.mesh_shape, each.axes, AXES)] += times * each.bytes
    return found
