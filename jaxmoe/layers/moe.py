"""The Mixture-of-Experts layer: router, placement, dispatch and experts composed over the mesh."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmoe.config import MoEConfig
from jaxmoe.dispatch import Dispatch, DispatchLayout, choose, get_dispatch
from jaxmoe.kernels.grouped_matmul import expert_mlp
from jaxmoe.layers.host_data import HostData
from jaxmoe.layers.param import ParamFactory, RowMap
from jaxmoe.layers.router import route
from jaxmoe.mesh import EP, TP, axes_size, named
from jaxmoe.placement import ExpertPlacement, make_placement


class MoEStats(NamedTuple):
    """What one call of the layer did, over all devices.

    Attributes:
        expert_counts: int32 [E], (token, choice) pairs that went to each logical expert.
        dispatch_rounds: int32, exchanges the dispatch needed; 0 where it exchanges no rows.
    """

    expert_counts: jax.Array
    dispatch_rounds: jax.Array


class PlacementTable(nnx.Variable):
    """Placement as arrays the compiled program reads, so that it can change without a recompilation."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything about a call that is known at compile time."""

    config: MoEConfig
    mesh: Mesh
    layout: DispatchLayout
    dispatch: Dispatch
    kernels: str


class MoE(nnx.Module):
    """Routed experts over a (dp, tp, ep) mesh, each device holding its own experts only.

    y = Σ_k weight_k · expert_{id_k}(x), with expert(x) = W_down (act(W_gate x) · W_up x).
    The stacks `w_gate_up` [P, 2, F, D] and `w_down` [P, D, F] are sharded over `expert_axes`
    on their slot dim, and over tp on F unless tp is one of `expert_axes`.

    Args:
        config: sizes, activation and router.
        mesh: from `jaxmoe.make_mesh`.
        placement: a strategy's name or an `ExpertPlacement` over the devices along `expert_axes`.
        expert_axes: mesh axes that share the experts: ``("ep",)``, or ``("ep", "tp")`` for whole
            experts on tp ranks too, better where F is small.
        dispatch: a name in `jaxmoe.dispatch.DISPATCHES`, or "auto".
        kernels: a backend of `jaxmoe.kernels.grouped_matmul`, or "auto".
        dtype: of the expert weights; the router's are float32.
        rngs: random streams for the weights; None leaves them abstract, for a loader to fill.

    Raises:
        ValueError: the placement does not fit, F does not divide over tp, or a name is unknown.

    Example:
        >>> config = MoEConfig(num_experts=4, num_experts_per_tok=2, hidden_size=8, moe_intermediate_size=16)
        >>> layer = MoE(config, mesh=jaxmoe.make_mesh(ep=jax.device_count()), rngs=nnx.Rngs(0))
        >>> y, stats = layer(jnp.ones((3, 8)))
        >>> y.shape
        (3, 8)
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        mesh: Mesh,
        placement: str | ExpertPlacement = "linear",
        expert_axes: tuple[str, ...] = (EP,),
        dispatch: str = "auto",
        kernels: str = "auto",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        check_expert_axes(expert_axes)
        E, F, D = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.config, self.mesh, self.expert_axes = config, mesh, expert_axes
        self.dispatch, self.kernels = dispatch, kernels
        if dispatch != "auto":
            get_dispatch(dispatch)
        self._placement = HostData(make_placement(placement, E, axes_size(mesh, expert_axes)))

        width_axis = None if TP in expert_axes else TP
        if width_axis and F % mesh.shape[TP]:
            raise ValueError(
                f"the expert width is split evenly over tp: moe_intermediate_size={F} is no multiple of "
                f'tp={mesh.shape[TP]}; use a tp that divides it, or expert_axes=("ep", "tp")'
            )
        slots = RowMap(tuple(self.placement.slot_to_expert.tolist()), E)
        slot_count = self.placement.num_slots
        param = ParamFactory(mesh, dtype, rngs)
        self.w_router = param((E, D), dtype=jnp.float32)
        self.w_gate_up = param((slot_count, 2, F, D), expert_axes, None, width_axis, None, rows=slots)
        self.w_down = param((slot_count, D, F), expert_axes, None, width_axis, rows=slots)
        self.expert_to_slots = PlacementTable(jax.device_put(self.placement.expert_to_slots, named(mesh)))
        self.replica_counts = PlacementTable(jax.device_put(self.placement.replica_counts, named(mesh)))

    @property
    def placement(self) -> ExpertPlacement:
        """Which slot holds which expert."""
        return self._placement.value

    def __call__(self, x: jax.Array, token_mask: jax.Array | None = None) -> tuple[jax.Array, MoEStats]:
        """Apply the layer.

        Args:
            x: [..., D], any number of tokens.
            token_mask: bool [...], False for tokens that go to no expert and come back as zeros.

        Returns:
            y [..., D] in x's dtype, and the call's statistics.
        """
        if x.shape[-1] != self.config.hidden_size:
            raise ValueError(f"the last dim of x is hidden_size={self.config.hidden_size}; got shape {x.shape}")
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = jnp.ones(x_TD.shape[0], bool) if token_mask is None else token_mask.reshape(-1)
        y_TD, stats = _forward(
            x_TD,
            mask_T,
            self.w_router[...],
            self.w_gate_up[...],
            self.w_down[...],
            self.expert_to_slots[...],
            self.replica_counts[...],
            plan=self._plan(x_TD.shape[0], x.dtype),
        )
        return y_TD.reshape(x.shape), stats

    def _plan(self, T: int, dtype: Any) -> _Plan:
        partial_axes = () if TP in self.expert_axes else (TP,)
        layout = DispatchLayout(
            mesh_shape=tuple(self.mesh.shape.items()),
            expert_axes=self.expert_axes,
            partial_axes=partial_axes,
            num_slots=self.w_gate_up.shape[0],
        )
        if self.dispatch == "auto":
            # Devices off the expert axes (dp) each take their own part of the tokens.
            groups = self.mesh.size // layout.num_devices // layout.size(partial_axes)
            K, D = self.config.num_experts_per_tok, self.config.hidden_size
            dispatch = choose(-(-T // groups), K, D, jnp.dtype(dtype).itemsize, layout)
        else:
            dispatch = get_dispatch(self.dispatch)
        return _Plan(self.config, self.mesh, layout, dispatch, self.kernels)


def check_expert_axes(expert_axes: tuple[str, ...]) -> None:
    """Refuse expert axes that no code path serves.

    Raises:
        ValueError: not ("ep",) or ("ep", "tp").
    """
    if tuple(expert_axes) not in ((EP,), (EP, TP)):
        raise ValueError(f'expert_axes is ("ep",) or ("ep", "tp"); got {expert_axes!r}')


@partial(jax.jit, static_argnames="plan")
def _forward(
    x_TD: jax.Array,
    mask_T: jax.Array,
    w_router_ED: jax.Array,
    w_gate_up_P2FD: jax.Array,
    w_down_PDF: jax.Array,
    expert_to_slots: jax.Array,
    replica_counts_E: jax.Array,
    *,
    plan: _Plan,
) -> tuple[jax.Array, MoEStats]:
    """The layer as one shard_map over all three axes; tokens are padded to split evenly."""
    layout, config = plan.layout, plan.config
    token_axes = plan.dispatch.token_axes(layout)
    T = x_TD.shape[0]
    padding = -T % layout.size(token_axes)
    x_TD = jnp.pad(x_TD, ((0, padding), (0, 0)))
    mask_T = jnp.pad(mask_T, (0, padding))

    def local(
        x_TD: jax.Array,
        mask_T: jax.Array,
        w_router_ED: jax.Array,
        w_gate_up_p2FD: jax.Array,
        w_down_pDF: jax.Array,
        expert_to_slots: jax.Array,
        replica_counts_E: jax.Array,
    ) -> tuple[jax.Array, MoEStats]:
        def apply_experts(rows_RD: jax.Array, sizes_p: jax.Array, dtype: jnp.dtype) -> jax.Array:
            return expert_mlp(
                rows_RD,
                w_gate_up_p2FD,
                w_down_pDF,
                sizes_p,
                activation=config.activation,
                out_dtype=dtype,
                backend=plan.kernels,
            )

        ids_TK, weights_TK = route(x_TD, w_router_ED, config.num_experts_per_tok, config.router)
        slots_TK = choose_slots(ids_TK, expert_to_slots, replica_counts_E)
        slots_TK = jnp.where(mask_T[:, None], slots_TK, -1)
        y_TD, dispatched = plan.dispatch.run(x_TD, slots_TK, weights_TK, apply_experts, layout)

        pairs_TK = jnp.where(mask_T[:, None], ids_TK, config.num_experts)
        counts_E = jnp.bincount(pairs_TK.reshape(-1), length=config.num_experts).astype(jnp.int32)
        if token_axes:
            counts_E = jax.lax.psum(counts_E, token_axes)
        return y_TD.astype(x_TD.dtype), MoEStats(counts_E, dispatched.rounds)

    width_axis = TP if TP in layout.partial_axes else None
    y_TD, stats = jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(
            P(token_axes),
            P(token_axes),
            P(),
            P(layout.expert_axes, None, width_axis),
            P(layout.expert_axes, None, width_axis),
            P(),
            P(),
        ),
        out_specs=(P(token_axes), P()),
        check_vma=False,
    )(x_TD, mask_T, w_router_ED, w_gate_up_P2FD, w_down_PDF, expert_to_slots, replica_counts_E)
    return y_TD[:T], stats


def choose_slots(ids_TK: jax.Array, expert_to_slots: jax.Array, replica_counts_E: jax.Array) -> jax.Array:
    """The physical slot of every chosen expert; tokens take turns over an expert's replicas."""
    if expert_to_slots.shape[1] == 1:
        return expert_to_slots[ids_TK, 0]
    token_T1 = jnp.arange(ids_TK.shape[0])[:, None]
    return expert_to_slots[ids_TK, token_T1 % replica_counts_E[ids_TK]]
