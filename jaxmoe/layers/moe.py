"""The Mixture-of-Experts layer: router, placement, dispatch and experts composed over the mesh."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.config import MoEConfig
from jaxmoe.dispatch import (
    DispatchChoice,
    DispatchLayout,
    DispatchShape,
    check_wire_dtype,
    explain_dispatch,
    get_dispatch,
)
from jaxmoe.kernels.grouped_matmul import Choice, Work, check_backend, choose_backend, hold_trials
from jaxmoe.layers.adapted_experts import ExpertFactors
from jaxmoe.layers.expert_stack import ExpertStack
from jaxmoe.layers.experts import ExpertStacks, expert_work, make_expert_stacks
from jaxmoe.layers.explicit_mesh import apply_on_auto_axes
from jaxmoe.layers.latent import LatentProjection, from_latent, make_latent_projection, to_latent
from jaxmoe.layers.low_rank import FACTOR_ENDINGS
from jaxmoe.layers.mlp import MLP
from jaxmoe.layers.moe_checks import (
    check_made_of,
    check_not_recorded,
    check_slots,
    checked_choices,
    checked_mask,
    checked_router_input,
    checked_tokens,
)
from jaxmoe.layers.param import ParamFactory
from jaxmoe.layers.placement_table import PlacementTable, hold_tables, placement_tables, read_placement
from jaxmoe.layers.replicas import PlacementTables, ReplicaRule
from jaxmoe.layers.routed_experts import MoEStats, RoutedPlan, RoutedWeights, routed_experts
from jaxmoe.layers.router import RouterWeights, make_router_weights
from jaxmoe.layers.usable import check_usable
from jaxmoe.layers.weights import WeightSpecs, held, hold
from jaxmoe.mesh import EP, TP, MeshAxes, auto_mesh, axes_size, batch_axes, padded_batch
from jaxmoe.placement import ExpertPlacement, make_placement


class MoE(nnx.Module):
    """Routed experts over a (dp, tp, ep) mesh, each device holding its own experts only.

    y = Σ_k weight_k · expert_{id_k}(x), with expert(x) = W_down (act(W_gate x) · W_up x); or
    Σ_k expert_{id_k}(weight_k · x) with `MoEConfig.weights_on_input`. With `MoEConfig.latent_size` the experts see
    W_in x, and W_out brings their sum back, normalized with `MoEConfig.latent_norm_eps`: rows of that width X instead of D
    travel. Of `MoEConfig.zero_experts`, which are chosen like the others, expert(x) = x, and no row travels.
    The stacks `w_gate_up` [P, 2, F, D] and `w_down` [P, D, F] are sharded over `expert_axes`
    on their slot dim, and over tp on F unless tp is one of `expert_axes`.

    The placement is in the layer's state, beside the stacks that lie by it: a whole state goes into any layer of the
    same config and number of devices. Parameters alone go only into a layer with the placement that they were taken
    with, and a state with another one is refused at the next call; raw arrays without Flax's Variables around them cannot
    be told apart. `jaxmoe.logical_state` takes parameters in an order that fits all.

    Args:
        config: sizes, activation and router.
        mesh: mesh from `jaxmoe.make_mesh`, or one of your own, its axes of type Auto or Explicit.
        axis_names: axes of your own mesh that play dp, tp and ep, as in ``{"dp": ("data", "fsdp"), "ep": "expert"}``; a
            part that is left out is played by the axis of its own name, or by none. Over other axes the layer is
            computed alike.
        placement: name of a strategy, or an `ExpertPlacement` over the devices along `expert_axes`.
        expert_axes: mesh axes that share the experts: ``("ep",)``; ``("ep", "tp")`` for whole experts on tp
            ranks too, better where F is small; or ``("dp", "ep")`` to spread them over the replicas.
        dispatch: name in `jaxmoe.dispatch.DISPATCHES`, or "auto".
        wire_dtype: dtype of rows on their way to experts, where a dispatch exchanges them: "float8_e4m3fn" rounds them to
            it, each with a scale of its own; None sends them as they are.
        kernels: name of a backend of `jaxmoe.kernels.grouped_matmul`, or "auto".
        dtype: dtype of the expert weights and of x; the router's weights are float32, or float64 where these are.
        rngs: random streams for the weights; None leaves them abstract, for a loader to fill. Replicas begin alike, and
            the gradient of each is that of its own tokens: to train them, add up those of an expert's slots.

    Raises:
        ValueError: the placement does not fit, F does not divide over tp, or a name is unknown.
        TypeError: config, mesh or rngs is something else.

    Example:
        >>> config = MoEConfig(num_experts=4, num_experts_per_tok=2, hidden_size=8, moe_intermediate_size=16)
        >>> layer = MoE(config, mesh=jaxmoe.make_mesh(ep=jax.device_count()), rngs=nnx.Rngs(0))
        >>> y, stats = layer(jnp.ones((3, 8)))
        >>> y.shape
        (3, 8)
    """

    # Parameters that may be held packed.
    packable = ("w_gate_up", "w_down")

    w_router: nnx.Param
    w_gate_up: nnx.Param
    slot_to_expert: PlacementTable

    def __init__(
        self,
        config: MoEConfig,
        *,
        mesh: Mesh,
        axis_names: Mapping[str, str | Sequence[str]] | None = None,
        placement: str | ExpertPlacement = "linear",
        expert_axes: tuple[str, ...] = (EP,),
        dispatch: str = "auto",
        wire_dtype: str | None = None,
        kernels: str = "auto",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        check_made_of(config, mesh, rngs, dtype, expert_axes)
        self.recorder: Any = None  # of the model that the layer is a part of, while its routing is recorded
        self.config, self.mesh, self.expert_axes = config, mesh, tuple(expert_axes)
        self._dtype = jnp.dtype(dtype)
        self.axes = MeshAxes.of(mesh, axis_names)
        slots_over = self.expert_axis_names
        self.dispatch, self.wire_dtype, self.kernels = dispatch, wire_dtype, kernels
        check_wire_dtype(wire_dtype)
        if kernels != "auto":
            check_backend(kernels, mesh.devices.flat[0])
        placement = make_placement(placement, config.num_experts, axes_size(mesh, slots_over))
        self._check_dispatch(dispatch, self._layout_of(placement.num_slots))
        param = ParamFactory(mesh, dtype, rngs, self.axes, kernels)
        hold(self, make_router_weights(config, param=param))
        hold(self, make_expert_stacks(config, placement, slots_over, self._width_axis_names, param=param))
        hold(self, make_latent_projection(config, param=param))
        if config.shared is not None:
            self.shared = MLP(config.shared, param=param)
        if config.shared_gate:
            self.w_shared_gate = param((1, config.hidden_size))
        self._specs = WeightSpecs.of(self)
        self._set_tables(placement, ReplicaRule())
        if kernels == "auto" and rngs is not None:
            hold_trials(mesh, [self._kernel_work(self._dtype)])

    @property
    def placement(self) -> ExpertPlacement:
        """The expert in every slot, as the layer's state says; it is read from the devices.

        Raises:
            ValueError: the state has no values: the layer is traced, abstract, or several layers stacked in one.
        """
        return read_placement(
            self.slot_to_expert, self.config.num_experts, axes_size(self.mesh, self.expert_axis_names)
        )

    @property
    def expert_axis_names(self) -> tuple[str, ...]:
        """The axes of the mesh that the slots are split over."""
        return self.axes.names(*self.expert_axes)

    @property
    def _width_axis_names(self) -> tuple[str, ...]:
        """The axes of the mesh that F is split over; none where tp ranks have whole experts."""
        return () if TP in self.expert_axes else self.axes.tp

    @property
    def _activation_dtype(self) -> Any:
        """The dtype of x: that of the experts, or what the layer was made with where these are packed."""
        packed = any(name == "w_gate_up" for name, _ in self._specs.packings)
        return self._dtype if packed else self.w_gate_up.dtype

    def expert_stacks(self) -> list[ExpertStack]:
        """The parameters whose dim 0 is the physical slots."""
        return [param for param in vars(self).values() if isinstance(param, ExpertStack)]

    def expert_factors(self) -> list[nnx.Variable]:
        """The factors of adapters of the routed experts, whose dim 0 is the physical slots too."""
        return [getattr(self, name) for name in ExpertFactors._fields if hasattr(self, name)]

    def set_placement(self, placement: ExpertPlacement) -> None:
        """Say that the stacks hold what `placement` says; `jaxmoe.layers.swap_experts` brings them there."""
        last_load = np.asarray(self.last_load[...]) if hasattr(self, "last_load") else None
        for stack in self.expert_stacks():
            stack.note_slots(tuple(placement.slot_to_expert.tolist()))
        self._set_tables(placement, ReplicaRule(self.replica_choice, self.devices_per_node, last_load))

    def choose_replicas(
        self, choice: str, *, devices_per_node: int | None = None, last_load: np.ndarray | None = None
    ) -> None:
        """Say which replica a token goes to where its expert has several; the result does not depend on it.

        Args:
            choice: name in `jaxmoe.placement.replicas.REPLICA_CHOICES`: "modulo", tokens take turns; "random";
                "local_first", the nearest to the device a token is on, where the dispatch leaves tokens on devices of
                their own; or "least_loaded".
            devices_per_node: number of devices of a node along `expert_axes`, for "local_first"; None for a single node.
            last_load: [devices along `expert_axes`], rows that each received in the last window, for "least_loaded".
                New ones may be given at any time; nothing is compiled again.

        Raises:
            ValueError: the choice is unknown, or the other arguments do not fit.
        """
        self._set_tables(self.placement, ReplicaRule(choice, devices_per_node, last_load))

    def _set_tables(self, placement: ExpertPlacement, rule: ReplicaRule) -> None:
        hold_tables(self, placement_tables(placement, rule, self.mesh, self.expert_axis_names))
        self.replica_choice, self.devices_per_node = rule.choice, rule.devices_per_node

    def __call__(
        self,
        x: jax.Array,
        token_mask: jax.Array | None = None,
        router_x: jax.Array | None = None,
        *,
        expert_ids: jax.Array | None = None,
        dispatch: str | None = None,
        adapter_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, MoEStats]:
        """Apply the layer.

        Args:
            x: [..., D], any number of tokens.
            token_mask: bool [...], False for tokens that go to no expert and come back as zeros; neither they nor their
                cotangents reach a result or a gradient, whatever they hold.
            router_x: [..., D], input of the router where that is not x.
            expert_ids: integers [..., K], logical experts to take instead of the router's choice, as `MoEStats.expert_ids`
                gives them; -1 in all K for a token whose experts the router chooses. The weights are the router's, and
                gradients reach it through them. Inside a program of your own the numbers cannot be checked; one that is
                no expert's makes NaN.
            dispatch: name of a dispatch for this call; None for the layer's own.
            adapter_ids: int32 [...], adapter of each token, of those that the layer holds factors of, -1 for none; None for
                none at all.

        Returns:
            y [..., D] in x's dtype, and the call's statistics. On a mesh with axes of type Explicit y is sharded like x.

        Raises:
            ValueError: a shape or dtype does not fit, `expert_ids` are no choices of this layer, or the program is on
                another mesh.
            RuntimeError: the layer has no weights, or is called by itself while its model is recorded.
        """
        check_not_recorded(self.recorder, self, self.w_router.get_value())
        check_usable(self)
        check_slots(self.w_gate_up.shape[0], self.slot_to_expert.shape[0])
        x = checked_tokens(x, self.config.hidden_size, self._activation_dtype)
        token_mask, router_x = checked_mask(token_mask, x), checked_router_input(router_x, x)
        expert_ids = checked_choices(expert_ids, x, self.config)

        def apply(layer: MoE, *arrays: Any) -> tuple[jax.Array, MoEStats]:
            return layer._apply(*arrays, dispatch=dispatch)

        return apply_on_auto_axes(apply, self, self.mesh, x, token_mask, router_x, expert_ids, adapter_ids)

    def _apply(
        self,
        x: jax.Array,
        token_mask: jax.Array | None,
        router_x: jax.Array | None,
        expert_ids: jax.Array | None,
        adapter_ids: jax.Array | None,
        *,
        dispatch: str | None,
    ) -> tuple[jax.Array, MoEStats]:
        """The layer over a mesh of type Auto: y = W_out Σ_k weight_k · expert_{id_k}(W_in x) + shared(x)."""
        x_TD = x.reshape(-1, x.shape[-1])
        router_TD = None if router_x is None else router_x.reshape(x_TD.shape)
        ids_TK = None if expert_ids is None else expert_ids.reshape(-1, expert_ids.shape[-1])
        mask_T = jnp.ones(x_TD.shape[0], bool) if token_mask is None else token_mask.reshape(-1)
        if token_mask is not None:
            # Before anything multiplies by them: a cotangent of zero times NaN is NaN.
            x_TD, router_TD = jax.tree.map(lambda y_TD: jnp.where(mask_T[:, None], y_TD, 0), (x_TD, router_TD))
        plan, latent = self._plan(x_TD.shape[0], x.dtype, dispatch), held(self, LatentProjection)
        weights, adapter_ids_T = self._routed_weights(), None
        if adapter_ids is not None:
            adapter_ids_T = adapter_ids.reshape(-1)
            weights, plan = self._with_factors(weights, plan)
        expert_TX = to_latent(x_TD, latent)
        if router_TD is None and expert_TX is not x_TD:
            router_TD = x_TD
        y_TX, stats = routed_experts(expert_TX, router_TD, mask_T, ids_TK, weights, adapter_ids_T, plan=plan)
        y_TD = from_latent(y_TX, latent, self.config.latent_norm_eps)
        if self.config.shared is not None:
            y_TD = y_TD + self._shared(x_TD, adapter_ids_T)
        if token_mask is not None:
            y_TD = jnp.where(mask_T[:, None], y_TD, 0)
        return y_TD.reshape(x.shape), stats

    def _routed_weights(self) -> RoutedWeights:
        stacks = self._specs.values_as(self, ExpertStacks)
        return RoutedWeights(held(self, RouterWeights), stacks, held(self, PlacementTables))

    def _with_factors(self, weights: RoutedWeights, plan: RoutedPlan) -> tuple[RoutedWeights, RoutedPlan]:
        """The same with the factors of adapters, where the layer has some of its routed experts."""
        specs: dict[str, Any] = {}
        for name in ("w_gate_up", "w_down"):
            if hasattr(self, name + FACTOR_ENDINGS[0]):
                names = [name + ending for ending in FACTOR_ENDINGS]
                specs |= zip(names, self._specs.factor_specs(self, name), strict=True)
        if not specs:
            return weights, plan
        # A kernel was chosen for the experts' two products in one; with factors there are others, each with its own choice.
        plan = dataclasses.replace(plan, factor_specs=ExpertFactors(**specs), kernels=self.kernels)
        return weights._replace(factors=held(self, ExpertFactors)), plan

    def _shared(self, x_TD: jax.Array, adapter_ids_T: jax.Array | None) -> jax.Array:
        """The sum of the experts that serve every token; it depends on no exchange, so it can overlap one."""
        T = x_TD.shape[0]
        padding = padded_batch(self.mesh, T, self.axes) - T
        padded_TD = jnp.pad(x_TD, ((0, padding), (0, 0)))
        if adapter_ids_T is not None:
            adapter_ids_T = jnp.pad(adapter_ids_T, (0, padding), constant_values=-1)
        y_TD = self.shared(padded_TD[:, None], batch_axes(self.mesh, T, self.axes), adapter_ids_T)[:T, 0]
        if not self.config.shared_gate:
            return y_TD
        return jax.nn.sigmoid(x_TD @ self.w_shared_gate[...].T) * y_TD

    @property
    def _platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def _processes(self) -> int:
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def _layout(self) -> DispatchLayout:
        return self._layout_of(self.w_gate_up.shape[0])

    def _layout_of(self, num_slots: int) -> DispatchLayout:
        return DispatchLayout(
            mesh_shape=tuple(self.mesh.shape.items()),
            expert_axes=self.expert_axis_names,
            partial_axes=self._width_axis_names,
            num_slots=num_slots,
            wire_dtype=self.wire_dtype,
            axes=self.axes,
        )

    def explain_dispatch(self, tokens: int, dtype: Any = None) -> DispatchChoice:
        """Say what ``dispatch="auto"`` uses for a call with so many tokens, and the modeled time of every backend.

        Args:
            tokens: number T of tokens, of all devices together.
            dtype: dtype of the activations; by default that of the expert weights.
        """
        return self._explain_dispatch(tokens, dtype)

    def _explain_dispatch(self, tokens: int, dtype: Any) -> DispatchChoice:
        # Each process has a user's folder of its own, and all have to choose alike: several go by published rates.
        kind = None if self.mesh.is_multi_process else self.mesh.devices.flat[0].device_kind
        shape = dispatch_shape(self, tokens, dtype)
        return explain_dispatch(shape, self._platform, kind, processes=self._processes)

    def check_dispatch(self, name: str) -> None:
        """Refuse a dispatch that is not known or cannot run on this mesh.

        Raises:
            ValueError: there is no backend of that name.
            NotImplementedError: it cannot run on these devices.
        """
        self._check_dispatch(name, self._layout)

    def _check_dispatch(self, name: str, layout: DispatchLayout) -> None:
        if name != "auto":
            get_dispatch(name, self._platform, layout, processes=self._processes)

    def _choose_kernels(self, T: int, dtype: Any) -> Choice:
        if self.kernels != "auto":
            return Choice(self.kernels, "as it was asked for")
        rows_per_group = T * self.config.num_experts_per_tok / max(self.w_gate_up.shape[0], 1)
        kind = self.mesh.devices.flat[0].device_kind
        return choose_backend(self._kernel_work(dtype), kind, rows_per_group=rows_per_group)

    def _kernel_work(self, dtype: Any) -> Work:
        return expert_work(
            self._specs.values_as(self, ExpertStacks),
            self._specs.specs_as(self, ExpertStacks),
            self.config,
            axis_sizes=dict(self.mesh.shape),
            dtype=dtype,
        )

    def _plan(self, T: int, dtype: Any, dispatch: str | None = None) -> RoutedPlan:
        name = dispatch or self.dispatch
        # Public methods are not called from here: nnx.tabulate jits them all, and their results are no arrays.
        name = self._explain_dispatch(T, dtype).name if name == "auto" else name
        backend = get_dispatch(name, self._platform, self._layout, processes=self._processes)
        return RoutedPlan(
            config=self.config,
            mesh=auto_mesh(self.mesh),
            layout=self._layout,
            dispatch=backend,
            kernels=self._choose_kernels(T, dtype).backend,
            replica_choice=self.replica_choice,
            stack_specs=tuple(jax.tree.leaves(self._specs.specs_as(self, ExpertStacks))),
        )


def dispatch_shape(layer: MoE, tokens: int, dtype: Any = None) -> DispatchShape:
    """Sizes of a call of a layer, as dispatch sees them; arguments are those of `MoE.explain_dispatch`."""
    return DispatchShape(
        tokens=tokens,
        choices=layer.config.num_experts_per_tok,
        width=layer.config.expert_input_size,
        itemsize=jnp.dtype(layer._activation_dtype if dtype is None else dtype).itemsize,
        layout=layer._layout,
    )
