"""The routed experts of a layer as one program over the mesh: route, choose slots, dispatch.

Letters here, beside the common ones of docs/concepts/letters.md: X the width of the experts' inputs.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxmoe.config import MoEConfig
from jaxmoe.dispatch import Dispatch, DispatchLayout
from jaxmoe.layers.adapted_experts import ExpertFactors, adapted_experts, fine_slots
from jaxmoe.layers.experts import ExpertStacks, local_experts
from jaxmoe.layers.losses import RouterSums, load_balancing_loss, router_sums, router_z_loss
from jaxmoe.layers.placement_table import table_specs
from jaxmoe.layers.replicas import PlacementTables, choose_replicas
from jaxmoe.layers.router import RouterWeights, choose_experts, router_logits


class MoEStats(NamedTuple):
    """Statistics of one call of the layer, over all devices.

    Attributes:
        expert_counts: int32 [E], number of (token, choice) pairs that went to each logical expert.
        expert_ids: int32 [T, K], logical experts of each token, E and above for zero experts; -1 where `token_mask` is
            False.
        dispatch_rounds: int32, number of exchanges the dispatch needed; 0 where it exchanges no rows.
        rows_sent: int32 [dp, tp, ep, n], rows of activations that the device at (dp, tp, ep) sent to each of the n
            devices that it shares the experts with, by their number along `expert_axes`; its own stay where they are.
        load_balancing_loss: float32 (float64 for float64), `jaxmoe.layers.losses.load_balancing_loss`; differentiable.
        router_z_loss: number of that dtype, `jaxmoe.layers.losses.router_z_loss`; differentiable.
        zero_counts: int32 [zero experts], the same as `expert_counts` of each of them; None where the layer has none.
    """

    expert_counts: jax.Array
    expert_ids: jax.Array
    dispatch_rounds: jax.Array
    rows_sent: jax.Array
    load_balancing_loss: jax.Array
    router_z_loss: jax.Array
    zero_counts: jax.Array | None = None


# By number, as in a plain tuple: nnx.tabulate cannot print a tuple with names inside another one.
jax.tree_util.register_pytree_with_keys(
    MoEStats,
    lambda stats: ([(jax.tree_util.SequenceKey(i), value) for i, value in enumerate(stats)], None),
    lambda _, values: MoEStats(*values),
)


class RoutedWeights(NamedTuple):
    """The arrays that the program reads besides the tokens; also holds their partition specs.

    Attributes:
        router: weights of the router.
        stacks: weights of the experts.
        tables: placement and replica choice.
        factors: factors of the experts' adapters; None where no token of the call has an adapter.
    """

    router: RouterWeights
    stacks: ExpertStacks
    tables: PlacementTables
    factors: ExpertFactors | None = None


@dataclasses.dataclass(frozen=True)
class RoutedPlan:
    """Everything about a call that is known at compile time.

    Attributes:
        config: config of the layer.
        mesh: mesh with axes of type Auto.
        layout: places of the experts on it.
        dispatch: backend that brings tokens to them.
        kernels: backend of the grouped matmul, or "auto".
        replica_choice: name of the rule among replicas.
        stack_specs: partition specs of the arrays of the expert stacks, in the order of their tree.
        factor_specs: partition specs of the adapters' factors, where a call has some.
    """

    config: MoEConfig
    mesh: Mesh
    layout: DispatchLayout
    dispatch: Dispatch
    kernels: str
    replica_choice: str
    stack_specs: tuple[P, ...]
    factor_specs: ExpertFactors | None = None

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes of the mesh that the tokens are split over."""
        return self.dispatch.token_axes(self.layout)

    def weight_specs(self, weights: RoutedWeights) -> RoutedWeights:
        """The partition specs of the program's weights; the router is whole on every device."""
        router = RouterWeights._make([P()] * len(RouterWeights._fields))
        stacks = jax.tree.unflatten(jax.tree.structure(weights.stacks), self.stack_specs)
        return RoutedWeights(router, stacks, table_specs(self.layout.expert_axes), self.factor_specs)

    @property
    def stats_specs(self) -> MoEStats:
        """The partition specs of the statistics."""
        axes = self.layout.axes
        specs: Any = dict.fromkeys(MoEStats._fields, P())
        return MoEStats(**specs | {"expert_ids": P(self.token_axes), "rows_sent": P(axes.dp, axes.tp, axes.ep)})


@partial(jax.jit, static_argnames="plan")
def routed_experts(
    x_TX: jax.Array,
    router_TD: jax.Array | None,
    mask_T: jax.Array,
    expert_ids_TK: jax.Array | None,
    weights: RoutedWeights,
    adapter_ids_T: jax.Array | None = None,
    *,
    plan: RoutedPlan,
) -> tuple[jax.Array, MoEStats]:
    """Compute Σ_k weight_k · expert_{id_k}(x) in one `shard_map` over all axes; tokens are padded to split evenly.

    A zero expert gives x, which needs no dispatch: the token's device adds weight · x where it gets the sum of the others.

    Args:
        x_TX: inputs of the experts.
        router_TD: inputs of the router; None for those of the experts, which travel once then where they have to.
        mask_T: bool, False for tokens that go to no expert.
        expert_ids_TK: choices to take instead of the router's own, -1 for none; None for all of the router's own.
        weights: arrays of the layer.
        adapter_ids_T: int32, adapter of each token, -1 for none; where `weights` have factors.
        plan: plan of the call.

    Returns:
        [T, X] in x's dtype, and the statistics of the call.
    """
    layout, token_axes, T = plan.layout, plan.token_axes, x_TX.shape[0]
    padding = layout.tokens_per_device(T, token_axes) * layout.size(token_axes) - T
    x_TX, router_TD = jax.tree.map(lambda y_TD: jnp.pad(y_TD, ((0, padding), (0, 0))), (x_TX, router_TD))
    mask_T = jnp.pad(mask_T, (0, padding))
    if expert_ids_TK is not None:
        expert_ids_TK = jnp.pad(expert_ids_TK, ((0, padding), (0, 0)), constant_values=-1)
    if adapter_ids_T is not None:
        adapter_ids_T = jnp.pad(adapter_ids_T, (0, padding), constant_values=-1)
    y_TX, stats = jax.shard_map(
        partial(_on_one_device, plan=plan),
        mesh=plan.mesh,
        in_specs=(*[P(token_axes)] * 4, plan.weight_specs(weights), P(token_axes)),
        out_specs=(P(token_axes), plan.stats_specs),
        check_vma=False,
    )(x_TX, router_TD, mask_T, expert_ids_TK, weights, adapter_ids_T)
    return y_TX[:T], stats._replace(expert_ids=stats.expert_ids[:T])


def _on_one_device(
    x_TX: jax.Array,
    router_TD: jax.Array | None,
    mask_T: jax.Array,
    given_TK: jax.Array | None,
    weights: RoutedWeights,
    adapter_ids_T: jax.Array | None,
    *,
    plan: RoutedPlan,
) -> tuple[jax.Array, MoEStats]:
    """Serve one device's tokens by the experts of all, inside the `shard_map`."""
    config, token_axes, E = plan.config, plan.token_axes, plan.config.num_experts
    logits_TE = router_logits(x_TX if router_TD is None else router_TD, weights.router, config.router)
    ids_TK, weights_TK = choose_experts(logits_TE, weights.router, config.num_experts_per_tok, config.router, given_TK)
    slots_TK = choose_replicas(
        x_TX,
        jnp.minimum(ids_TK, E - 1) if config.zero_experts else ids_TK,
        weights.tables,
        choice=plan.replica_choice,
        first_token=jax.lax.axis_index(token_axes) * len(ids_TK) if token_axes else 0,
        own_tokens=set(plan.layout.expert_axes) <= set(token_axes),
    )
    sent_TK = mask_T[:, None] & (ids_TK < E) if config.zero_experts else mask_T[:, None]
    slots_TK = jnp.where(sent_TK, slots_TK, -1)
    experts = local_experts(
        weights.stacks,
        config,
        partial_axes=plan.layout.partial_axes,
        kernels=plan.kernels,
        device_kind=plan.mesh.devices.flat[0].device_kind,
    )
    layout = plan.layout
    if weights.factors is not None:
        assert adapter_ids_T is not None
        adapters = weights.factors.adapters
        slots_TK = fine_slots(slots_TK, adapter_ids_T, adapters)
        layout = dataclasses.replace(layout, num_slots=layout.num_slots * (adapters + 1))
        experts = adapted_experts(
            experts,
            weights.factors,
            config,
            backend=plan.kernels,
            device_kind=plan.mesh.devices.flat[0].device_kind,
        )
    y_TX, dispatched = plan.dispatch.run(x_TX, slots_TK, weights_TK, experts, layout, config.weights_on_input)
    if config.zero_experts:
        weights_T1 = jnp.sum(jnp.where(ids_TK < E, 0, weights_TK), axis=1, keepdims=True)
        y_TX = y_TX + weights_T1 * x_TX.astype(weights_T1.dtype)
    sums: RouterSums = jax.lax.psum(router_sums(logits_TE, ids_TK, mask_T), token_axes)
    return y_TX.astype(x_TX.dtype), MoEStats(
        expert_counts=sums.expert_counts[:E],
        expert_ids=jnp.where(mask_T[:, None], ids_TK, -1),
        dispatch_rounds=dispatched.rounds,
        rows_sent=dispatched.rows_sent_n[None, None, None],
        load_balancing_loss=load_balancing_loss(sums),
        router_z_loss=router_z_loss(sums),
        zero_counts=sums.expert_counts[E:] if config.zero_experts else None,
    )
