"""The Mixture-of-Experts layer: router, placement, dispatch and experts composed over the mesh."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmoe.config import MoEConfig
from jaxmoe.dispatch import ApplyExperts, Dispatch, DispatchLayout, choose_dispatch, get_dispatch
from jaxmoe.kernels.grouped_matmul import combine_halves, expert_mlp
from jaxmoe.layers.host_data import HostData
from jaxmoe.layers.losses import RouterSums, load_balancing_loss, router_sums, router_z_loss
from jaxmoe.layers.mlp import MLP
from jaxmoe.layers.param import ParamFactory, RowMap, set_row_map, zeros
from jaxmoe.layers.router import choose_experts, router_logits
from jaxmoe.mesh import EP, TP, axes_size, batch_axes, named, padded_batch
from jaxmoe.placement import ExpertPlacement, make_placement


class MoEStats(NamedTuple):
    """What one call of the layer did, over all devices.

    Attributes:
        expert_counts: int32 [E], (token, choice) pairs that went to each logical expert.
        expert_ids: int32 [T, K], the logical experts of each token, -1 where `token_mask` is False.
        dispatch_rounds: int32, exchanges the dispatch needed; 0 where it exchanges no rows.
        load_balancing_loss: float32, see `jaxmoe.layers.losses.load_balancing_loss`; differentiable.
        router_z_loss: float32, see `jaxmoe.layers.losses.router_z_loss`; differentiable.
    """

    expert_counts: jax.Array
    expert_ids: jax.Array
    dispatch_rounds: jax.Array
    load_balancing_loss: jax.Array
    router_z_loss: jax.Array


_EXPERT_STACKS = ("w_gate_up", "w_down", "b_gate_up", "b_down")


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

    y = Σ_k weight_k · expert_{id_k}(x), with expert(x) = W_down (act(W_gate x) · W_up x); or
    Σ_k expert_{id_k}(weight_k · x) with `MoEConfig.weights_on_input`.
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
        halves = 2 if config.gated else 1
        combine_halves(config.activation, config.activation_limit, gated=config.gated)
        self.w_router = param((E, D), dtype=jnp.float32)
        if config.router.logit_bias:
            self.b_router = param((E,), init=zeros, dtype=jnp.float32)
        if config.router.correction_bias:
            self.correction_bias = param((E,), init=zeros, dtype=jnp.float32)
        self.w_gate_up = param((slot_count, halves, F, D), expert_axes, None, width_axis, None, rows=slots)
        self.w_down = param((slot_count, D, F), expert_axes, None, width_axis, rows=slots)
        if config.bias:
            self.b_gate_up = param((slot_count, halves, F), expert_axes, None, width_axis, init=zeros, rows=slots)
            self.b_down = param((slot_count, D), expert_axes, init=zeros, rows=slots)
        if config.shared is not None:
            self.shared = MLP(config.shared, param=param)
        if config.shared_gate:
            self.w_shared_gate = param((1, D))
        expert_to_slots, replica_counts = _placement_tables(self.placement)
        self.expert_to_slots = PlacementTable(jax.device_put(expert_to_slots, named(mesh)))
        self.replica_counts = PlacementTable(jax.device_put(replica_counts, named(mesh)))

    @property
    def placement(self) -> ExpertPlacement:
        """Which slot holds which expert."""
        return self._placement.value

    def expert_stacks(self) -> list[nnx.Param]:
        """The parameters whose dim 0 is the physical slots."""
        return [getattr(self, name) for name in _EXPERT_STACKS if hasattr(self, name)]

    def set_placement(self, placement: ExpertPlacement) -> None:
        """Say that the stacks hold what `placement` says; `jaxmoe.layers.swap_experts` brings them there."""
        self._placement.value = placement
        for stack in self.expert_stacks():
            set_row_map(stack, RowMap(tuple(placement.slot_to_expert.tolist()), placement.num_experts))
        tables = zip((self.expert_to_slots, self.replica_counts), _placement_tables(placement), strict=True)
        for variable, table in tables:
            variable.set_value(jax.device_put(table, named(self.mesh)))

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
        params = {name: param[...] for name, param in vars(self).items() if isinstance(param, nnx.Variable)}
        y_TD, stats = _forward(x_TD, mask_T, params, plan=self._plan(x_TD.shape[0], x.dtype))
        if self.config.shared is not None:
            y_TD = y_TD + jnp.where(mask_T[:, None], self._shared(x_TD), 0)
        return y_TD.reshape(x.shape), stats

    def _shared(self, x_TD: jax.Array) -> jax.Array:
        """What the experts that serve every token add; it depends on no exchange, so it can overlap one."""
        T = x_TD.shape[0]
        padded_TD = jnp.pad(x_TD, ((0, padded_batch(self.mesh, T) - T), (0, 0)))
        y_TD = self.shared(padded_TD[:, None], batch_axes(self.mesh, T))[:T, 0]
        if not self.config.shared_gate:
            return y_TD
        return jax.nn.sigmoid(x_TD @ self.w_shared_gate[...].T) * y_TD

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
            platform = self.mesh.devices.flat[0].platform
            dispatch = choose_dispatch(-(-T // groups), K, D, jnp.dtype(dtype).itemsize, layout, platform)
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
    x_TD: jax.Array, mask_T: jax.Array, params: dict[str, jax.Array], *, plan: _Plan
) -> tuple[jax.Array, MoEStats]:
    """The routed experts as one shard_map over all three axes; tokens are padded to split evenly."""
    layout, config = plan.layout, plan.config
    token_axes = plan.dispatch.token_axes(layout)
    T = x_TD.shape[0]
    padding = -T % layout.size(token_axes)
    x_TD = jnp.pad(x_TD, ((0, padding), (0, 0)))
    mask_T = jnp.pad(mask_T, (0, padding))
    width_axis = TP if TP in layout.partial_axes else None
    expert_specs = {
        "w_gate_up": P(layout.expert_axes, None, width_axis),
        "w_down": P(layout.expert_axes, None, width_axis),
        "b_gate_up": P(layout.expert_axes, None, width_axis),
        "b_down": P(layout.expert_axes),
    }

    def local(x_TD: jax.Array, mask_T: jax.Array, params: dict[str, jax.Array]) -> tuple[jax.Array, MoEStats]:
        logits_TE = router_logits(x_TD, params, config.router)
        ids_TK, weights_TK = choose_experts(logits_TE, params, config.num_experts_per_tok, config.router)
        slots_TK = choose_slots(ids_TK, params["expert_to_slots"], params["replica_counts"])
        slots_TK = jnp.where(mask_T[:, None], slots_TK, -1)
        y_TD, dispatched = plan.dispatch.run(
            x_TD, slots_TK, weights_TK, _experts(params, plan), layout, config.weights_on_input
        )
        sums: RouterSums = jax.lax.psum(router_sums(logits_TE, ids_TK, mask_T), token_axes)
        return y_TD.astype(x_TD.dtype), MoEStats(
            expert_counts=sums.expert_counts,
            expert_ids=jnp.where(mask_T[:, None], ids_TK, -1),
            dispatch_rounds=dispatched.rounds,
            load_balancing_loss=load_balancing_loss(sums),
            router_z_loss=router_z_loss(sums),
        )

    stats_specs: Any = dict.fromkeys(MoEStats._fields, P()) | {"expert_ids": P(token_axes)}
    y_TD, stats = jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(P(token_axes), P(token_axes), {name: expert_specs.get(name, P()) for name in params}),
        out_specs=(P(token_axes), MoEStats(**stats_specs)),
        check_vma=False,
    )(x_TD, mask_T, params)
    return y_TD[:T], stats._replace(expert_ids=stats.expert_ids[:T])


def _experts(params: dict[str, jax.Array], plan: _Plan) -> ApplyExperts:
    """The local experts as the function a dispatch applies to rows grouped by slot."""
    config, b_down_pD = plan.config, params.get("b_down")
    if b_down_pD is not None and plan.layout.partial_axes:
        # The results are partial sums over tp: one rank adds the bias for all.
        first = jax.lax.axis_index(plan.layout.partial_axes) == 0
        b_down_pD = jnp.where(first, b_down_pD, 0)

    def apply_experts(rows_RD: jax.Array, sizes_p: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return expert_mlp(
            rows_RD,
            params["w_gate_up"],
            params["w_down"],
            sizes_p,
            b_gate_up_p2F=params.get("b_gate_up"),
            b_down_pD=b_down_pD,
            activation=config.activation,
            limit=config.activation_limit,
            out_dtype=dtype,
            backend=plan.kernels,
        )

    return apply_experts


def _placement_tables(placement: ExpertPlacement) -> tuple[np.ndarray, np.ndarray]:
    """Slots [E, R] of every expert and how many there are [E].

    R is the most replicas that any placement with as many slots can have: the tables of all of them have one shape.
    """
    slots = placement.expert_to_slots
    widest = placement.num_slots - placement.num_experts + 1
    padded = np.pad(slots, ((0, 0), (0, widest - slots.shape[1])), constant_values=-1)
    return padded, placement.replica_counts


def choose_slots(ids_TK: jax.Array, expert_to_slots: jax.Array, replica_counts_E: jax.Array) -> jax.Array:
    """The physical slot of every chosen expert; tokens take turns over an expert's replicas."""
    if expert_to_slots.shape[1] == 1:
        return expert_to_slots[ids_TK, 0]
    token_T1 = jnp.arange(ids_TK.shape[0])[:, None]
    return expert_to_slots[ids_TK, token_T1 % replica_counts_E[ids_TK]]
