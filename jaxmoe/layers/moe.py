"""The Mixture-of-Experts layer: router, placement, dispatch and experts composed over the mesh."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.checks import instance_of
from jaxmoe.config import MoEConfig
from jaxmoe.dispatch import (
    Dispatch,
    DispatchChoice,
    DispatchLayout,
    Experts,
    check_wire_dtype,
    explain_dispatch,
    get_dispatch,
)
from jaxmoe.kernels.dtypes import sum_dtype
from jaxmoe.kernels.grouped_matmul import check_backend, combine_halves, expert_mlp
from jaxmoe.layers.expert_stack import ExpertStack
from jaxmoe.layers.losses import RouterSums, load_balancing_loss, router_sums, router_z_loss
from jaxmoe.layers.mlp import MLP
from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.layers.placement_table import PlacementTable, placement_tables, read_placement
from jaxmoe.layers.replicas import ReplicaRule, choose_slots, token_draws, token_turns
from jaxmoe.layers.router import choose_experts, router_logits
from jaxmoe.layers.usable import check_usable
from jaxmoe.mesh import DP, EP, TP, MeshAxes, auto_mesh, axes_size, batch_axes, padded_batch
from jaxmoe.placement import ExpertPlacement, make_placement
from jaxmoe.placement.trace import check_choices


class MoEStats(NamedTuple):
    """What one call of the layer did, over all devices.

    Attributes:
        expert_counts: int32 [E], (token, choice) pairs that went to each logical expert.
        expert_ids: int32 [T, K], the logical experts of each token, -1 where `token_mask` is False.
        dispatch_rounds: int32, exchanges the dispatch needed; 0 where it exchanges no rows.
        rows_sent: int32 [dp, tp, ep, n], rows of activations that the device at (dp, tp, ep) sent to each of the n
            devices that it shares the experts with, by their number along `expert_axes`; its own stay where they are.
        load_balancing_loss: float32 (float64 for float64), see `jaxmoe.layers.losses.load_balancing_loss`; differentiable.
        router_z_loss: in the same, see `jaxmoe.layers.losses.router_z_loss`; differentiable.
    """

    expert_counts: jax.Array
    expert_ids: jax.Array
    dispatch_rounds: jax.Array
    rows_sent: jax.Array
    load_balancing_loss: jax.Array
    router_z_loss: jax.Array


# By number, as in a plain tuple: nnx.tabulate cannot print a tuple with names inside another one.
jax.tree_util.register_pytree_with_keys(
    MoEStats,
    lambda stats: ([(jax.tree_util.SequenceKey(i), value) for i, value in enumerate(stats)], None),
    lambda _, values: MoEStats(*values),
)


# The parameters whose dim 0 is the physical slots.
EXPERT_STACKS = ("w_gate_up", "w_down", "b_gate_up", "b_down")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything about a call that is known at compile time."""

    config: MoEConfig
    mesh: Mesh
    layout: DispatchLayout
    dispatch: Dispatch
    kernels: str
    replica_choice: str


class MoE(nnx.Module):
    """Routed experts over a (dp, tp, ep) mesh, each device holding its own experts only.

    y = Σ_k weight_k · expert_{id_k}(x), with expert(x) = W_down (act(W_gate x) · W_up x); or
    Σ_k expert_{id_k}(weight_k · x) with `MoEConfig.weights_on_input`. With `MoEConfig.latent_size` the experts see
    W_in x, and W_out brings their sum back: rows of that width X instead of D travel.
    The stacks `w_gate_up` [P, 2, F, D] and `w_down` [P, D, F] are sharded over `expert_axes`
    on their slot dim, and over tp on F unless tp is one of `expert_axes`.

    The placement is in the layer's state, beside the stacks that lie by it: a whole state goes into any layer of the
    same config and number of devices. Parameters alone go only into a layer with the placement that they were taken
    with, and a state with another one is refused at the next call; raw arrays without Flax's Variables around them cannot
    be told apart. `jaxmoe.logical_state` takes parameters in an order that fits all.

    Args:
        config: sizes, activation and router.
        mesh: from `jaxmoe.make_mesh`, or one of your own, its axes of type Auto or Explicit.
        axis_names: which axes of your own mesh play dp, tp and ep, as in ``{"dp": ("data", "fsdp"), "ep": "expert"}``; a
            part that is left out is played by the axis of its own name, or by none. Over other axes the layer is
            computed alike.
        placement: a strategy's name or an `ExpertPlacement` over the devices along `expert_axes`.
        expert_axes: mesh axes that share the experts: ``("ep",)``; ``("ep", "tp")`` for whole experts on tp
            ranks too, better where F is small; or ``("dp", "ep")`` to spread them over the replicas.
        dispatch: a name in `jaxmoe.dispatch.DISPATCHES`, or "auto".
        wire_dtype: "float8_e4m3fn" to round rows to it, each with a scale of its own, where a dispatch exchanges
            them on their way to experts; None to send them as they are.
        kernels: a backend of `jaxmoe.kernels.grouped_matmul`, or "auto".
        dtype: of the expert weights and of x; the router's weights are float32, or float64 where these are.
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
        instance_of("config", config, MoEConfig, "a jaxmoe.MoEConfig")
        instance_of("mesh", mesh, (Mesh, AbstractMesh), "a mesh, from jaxmoe.make_mesh or of your own")
        if rngs is not None:
            instance_of("rngs", rngs, nnx.Rngs, "flax.nnx.Rngs, or None for a layer without weights")
        check_layer_dtype(dtype)
        check_expert_axes(expert_axes)
        self.recorder: Any = None  # of the model that the layer is a part of, while its routing is recorded
        E, F, D = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.config, self.mesh, self.expert_axes = config, mesh, tuple(expert_axes)
        self.axes = MeshAxes.of(mesh, axis_names)
        slots_over = self.expert_axis_names
        self.dispatch, self.wire_dtype, self.kernels = dispatch, wire_dtype, kernels
        check_wire_dtype(wire_dtype)
        self.check_dispatch(dispatch)
        if kernels != "auto":
            check_backend(kernels, mesh.devices.flat[0])
        placement = make_placement(placement, E, axes_size(mesh, slots_over))

        width_axis = None if TP in expert_axes else self.axes.tp or None
        tp = axes_size(mesh, self.axes.tp)
        if width_axis and F % tp:
            raise ValueError(
                f"the expert width is split evenly over tp: moe_intermediate_size={F} is no multiple of "
                f'tp={tp}; use a tp that divides it, or expert_axes=("ep", "tp")'
            )
        slots, slot_count = tuple(placement.slot_to_expert.tolist()), placement.num_slots
        param = ParamFactory(mesh, dtype, rngs, self.axes)
        halves = 2 if config.gated else 1
        combine_halves(config.activation, config.activation_limit, gated=config.gated)
        of_router = sum_dtype(dtype)
        self.w_router = param((E, D), dtype=of_router)
        if config.router.logit_bias:
            self.b_router = param((E,), init=zeros, dtype=of_router)
        if config.router.correction_bias:
            self.correction_bias = param((E,), init=zeros, dtype=of_router)
        if config.router.expert_scale:
            self.expert_scale = param((E,), init=ones, dtype=of_router)
        if config.router.input_norm_eps is not None:
            self.router_norm = param((D,), init=ones, dtype=of_router)
        X = config.expert_input_size
        self.w_gate_up = param((slot_count, halves, F, X), slots_over, None, width_axis, None, slots=slots)
        self.w_down = param((slot_count, X, F), slots_over, None, width_axis, slots=slots)
        if config.bias:
            self.b_gate_up = param((slot_count, halves, F), slots_over, None, width_axis, init=zeros, slots=slots)
            self.b_down = param((slot_count, X), slots_over, init=zeros, slots=slots)
        if config.latent_size is not None:
            self.w_latent_in, self.w_latent_out = param((X, D)), param((D, X))
        if config.latent_bias:
            self.b_latent_in, self.b_latent_out = param((X,), init=zeros), param((D,), init=zeros)
        if config.shared is not None:
            self.shared = MLP(config.shared, param=param)
        if config.shared_gate:
            self.w_shared_gate = param((1, D))
        self._set_tables(placement, ReplicaRule())

    @property
    def placement(self) -> ExpertPlacement:
        """Which slot holds which expert, as the layer's state says; it is read from the devices.

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

    def expert_stacks(self) -> list[ExpertStack]:
        """The parameters whose dim 0 is the physical slots."""
        return [getattr(self, name) for name in EXPERT_STACKS if hasattr(self, name)]

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
            choice: "modulo", tokens take turns; "random"; "local_first", the nearest to the device a token is on, where
                the dispatch leaves tokens on devices of their own; or "least_loaded". See
                `jaxmoe.placement.replicas.REPLICA_CHOICES`.
            devices_per_node: devices of a node along `expert_axes`, for "local_first"; None for a single node.
            last_load: [devices along `expert_axes`], rows that each received in the last window, for "least_loaded".
                New ones may be given at any time; nothing is compiled again.

        Raises:
            ValueError: the choice is unknown, or the other arguments do not fit.
        """
        self._set_tables(self.placement, ReplicaRule(choice, devices_per_node, last_load))

    def _set_tables(self, placement: ExpertPlacement, rule: ReplicaRule) -> None:
        tables = placement_tables(placement, rule, self.mesh, self.expert_axis_names)
        self.replica_choice, self.devices_per_node = rule.choice, rule.devices_per_node
        for name in ("near_slots", "near_counts", "last_load"):
            if hasattr(self, name) and name not in tables:
                delattr(self, name)
        for name, table in tables.items():
            if hasattr(self, name):
                # The variable stays: another module may share it (nnx.clone(variables=False)), as it does the stacks.
                getattr(self, name).set_value(table.get_value())
            else:
                setattr(self, name, table)

    def __call__(
        self,
        x: jax.Array,
        token_mask: jax.Array | None = None,
        router_x: jax.Array | None = None,
        *,
        expert_ids: jax.Array | None = None,
        dispatch: str | None = None,
    ) -> tuple[jax.Array, MoEStats]:
        """Apply the layer.

        Args:
            x: [..., D], any number of tokens.
            token_mask: bool [...], False for tokens that go to no expert and come back as zeros; neither they nor their
                cotangents reach a result or a gradient, whatever they hold.
            router_x: [..., D], what the router looks at where that is not x.
            expert_ids: integers [..., K], logical experts to take instead of the router's choice, as `MoEStats.expert_ids`
                gives them; -1 in all K for a token whose experts the router chooses. The weights are the router's, and
                gradients reach it through them. Inside a program of your own the numbers cannot be checked; one that is
                no expert's makes NaN.
            dispatch: for this call; None for the layer's own.

        Returns:
            y [..., D] in x's dtype, and the call's statistics. On a mesh with axes of type Explicit y is sharded like x.

        Raises:
            ValueError: a shape or dtype does not fit, `expert_ids` are no choices of this layer, or the program is on
                another mesh.
            RuntimeError: the layer has no weights, or is called by itself while its model is recorded.
        """
        if self.recorder is not None and self.recorder.records(self, self.w_router.get_value()):
            raise RuntimeError(
                "the routing of this layer's model is being recorded, and the record is of model(tokens) and "
                "jaxmoe.generate alone; call the layer, or a method that returns statistics, outside of "
                "`with model.record_routing()`"
            )
        x, token_mask, router_x = self._checked(x, token_mask, router_x)
        if expert_ids is not None:
            expert_ids = self._given_choices(expert_ids, x.shape[:-1])
        context = jax.sharding.get_abstract_mesh()
        kinds = self._axis_kinds(context)
        explicit = tuple([axis for axis, kind in kinds.items() if kind == AxisType.Explicit])
        if not explicit:
            return self._apply(x, token_mask, router_x, expert_ids, dispatch)
        # Arrays carry their shardings in their types: inside they are as on a mesh of type Auto, and what comes out is
        # laid out like x.
        typed = jax.typeof(x).sharding
        spec = typed.spec if typed.mesh.axis_names == self.mesh.axis_names else P()
        graphdef, state = nnx.split(self)

        def sharded(spec: P) -> Any:
            return spec if not context.empty else NamedSharding(self.mesh, spec)

        stats = MoEStats(*[sharded(P())] * len(MoEStats._fields))
        apply = jax.sharding.auto_axes(
            lambda state, x, mask, router_x, ids: nnx.merge(graphdef, state)._apply(x, mask, router_x, ids, dispatch),
            axes=explicit,
            out_sharding=(sharded(spec), stats),
        )
        return apply(state, x, token_mask, router_x, expert_ids)

    def _checked(self, x: Any, token_mask: Any, router_x: Any) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """The arguments of a call as arrays."""
        check_usable(self)
        slots, placed = self.w_gate_up.shape[0], self.slot_to_expert.shape[0]
        if slots != placed:
            raise ValueError(
                f"expert stacks lie by the layer's placement: they have {slots} slots and the placement {placed}; give the "
                "layer a whole state, placement tables too, and not nnx.Param alone, or use jaxmoe.load_logical_state"
            )
        x, dtype, D = jnp.asarray(x), self.w_gate_up.dtype, self.config.hidden_size
        if x.ndim == 0 or x.shape[-1] != D:
            raise ValueError(f"the last dim of x is hidden_size={D}; got shape {x.shape}")
        if x.dtype != dtype:
            raise ValueError(f"x has the dtype of the layer, {dtype}; got {x.dtype}: convert it with astype")
        if token_mask is not None:
            token_mask = jnp.asarray(token_mask)
            if token_mask.shape != x.shape[:-1] or token_mask.dtype != bool:
                raise ValueError(
                    f"token_mask is bool {list(x.shape[:-1])}, one for each token of x {list(x.shape)}; got "
                    f"{token_mask.dtype} {list(token_mask.shape)}"
                )
        if router_x is not None:
            router_x = jnp.asarray(router_x)
            if router_x.shape != x.shape or not jnp.issubdtype(router_x.dtype, jnp.floating):
                raise ValueError(
                    f"router_x has the shape of x, {list(x.shape)}, and is floating point; got {router_x.dtype} "
                    f"{list(router_x.shape)}"
                )
        return x, token_mask, router_x

    def _axis_kinds(self, context: AbstractMesh) -> dict[str, AxisType]:
        """The type of each mesh axis as the call sees it."""
        mesh = self.mesh if context.empty else context
        if dict(mesh.shape) != dict(self.mesh.shape) or AxisType.Manual in mesh.axis_types:
            raise ValueError(
                f"the layer is on a mesh of {dict(self.mesh.shape)} and is called with {mesh}: make it on the mesh of the "
                "program (mesh=, axis_names=), and call it outside of shard_map, for it is one itself"
            )
        return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def _apply(
        self,
        x: jax.Array,
        token_mask: jax.Array | None,
        router_x: jax.Array | None,
        expert_ids: jax.Array | None,
        dispatch: str | None,
    ) -> tuple[jax.Array, MoEStats]:
        """The layer over a mesh of type Auto."""
        x_TD = x.reshape(-1, x.shape[-1])
        router_TD = x_TD if router_x is None else router_x.reshape(x_TD.shape)
        ids_TK = None if expert_ids is None else expert_ids.reshape(-1, expert_ids.shape[-1])
        params = {name: param[...] for name, param in vars(self).items() if isinstance(param, nnx.Variable)}
        if token_mask is None:
            mask_T = jnp.ones(x_TD.shape[0], bool)
        else:
            mask_T = token_mask.reshape(-1)
            # Before anything multiplies by them: a cotangent of zero times NaN is NaN.
            x_TD, router_TD = (jnp.where(mask_T[:, None], y_TD, 0) for y_TD in (x_TD, router_TD))
        plan = self._plan(x_TD.shape[0], x.dtype, dispatch)
        if self.config.latent_size is None:
            y_TD, stats = _forward(x_TD, router_TD, mask_T, ids_TK, params, plan=plan)
        else:
            y_TX, stats = _forward(self._latent(x_TD, "in"), router_TD, mask_T, ids_TK, params, plan=plan)
            y_TD = self._latent(y_TX, "out")
        if self.config.shared is not None:
            y_TD = y_TD + self._shared(x_TD)
        if token_mask is not None:
            y_TD = jnp.where(mask_T[:, None], y_TD, 0)
        return y_TD.reshape(x.shape), stats

    def _given_choices(self, expert_ids: Any, tokens: tuple[int, ...]) -> jax.Array:
        """`expert_ids` as int32 [..., K], seen to be choices of this layer as far as that can be seen here."""
        K = self.config.num_experts_per_tok
        if jnp.shape(expert_ids) != (*tokens, K) or not jnp.issubdtype(jnp.result_type(expert_ids), jnp.integer):
            raise ValueError(
                f"expert_ids are integers {[*tokens, K]}, num_experts_per_tok={K} for each token; got "
                f"{jnp.result_type(expert_ids)} {list(jnp.shape(expert_ids))}"
            )
        if not isinstance(expert_ids, jax.core.Tracer):
            check_choices(np.asarray(expert_ids).reshape(-1, K), self.config.num_experts)
        return jnp.asarray(expert_ids, jnp.int32)

    def _latent(self, x_TX: jax.Array, way: str) -> jax.Array:
        """From the model's width into that of the experts' inputs, or back."""
        y_TX = x_TX @ getattr(self, f"w_latent_{way}")[...].T
        return y_TX + getattr(self, f"b_latent_{way}")[...][None] if self.config.latent_bias else y_TX

    def _shared(self, x_TD: jax.Array) -> jax.Array:
        """What the experts that serve every token add; it depends on no exchange, so it can overlap one."""
        T = x_TD.shape[0]
        padded_TD = jnp.pad(x_TD, ((0, padded_batch(self.mesh, T, self.axes) - T), (0, 0)))
        y_TD = self.shared(padded_TD[:, None], batch_axes(self.mesh, T, self.axes))[:T, 0]
        if not self.config.shared_gate:
            return y_TD
        return jax.nn.sigmoid(x_TD @ self.w_shared_gate[...].T) * y_TD

    @property
    def _platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def _layout(self) -> DispatchLayout:
        return DispatchLayout(
            mesh_shape=tuple(self.mesh.shape.items()),
            expert_axes=self.expert_axis_names,
            partial_axes=() if TP in self.expert_axes else self.axes.tp,
            num_slots=self.w_gate_up.shape[0],
            wire_dtype=self.wire_dtype,
            axes=self.axes,
        )

    def explain_dispatch(self, tokens: int, dtype: Any = None) -> DispatchChoice:
        """What ``dispatch="auto"`` uses for a call with so many tokens, and the modelled time of every backend.

        Args:
            tokens: T, of all devices together.
            dtype: of the activations; that of the expert weights by default.
        """
        return self._explain_dispatch(tokens, dtype)

    def _explain_dispatch(self, tokens: int, dtype: Any) -> DispatchChoice:
        K, D = self.config.num_experts_per_tok, self.config.expert_input_size
        itemsize = jnp.dtype(self.w_gate_up.dtype if dtype is None else dtype).itemsize
        return explain_dispatch(tokens, K, D, itemsize, self._layout, self._platform)

    def check_dispatch(self, name: str) -> None:
        """Refuse a dispatch that is not known or cannot run on this mesh.

        Raises:
            ValueError: there is no backend of that name.
            NotImplementedError: it cannot run on these devices.
        """
        if name != "auto":
            get_dispatch(name, self._platform)

    def _plan(self, T: int, dtype: Any, dispatch: str | None = None) -> _Plan:
        name = dispatch or self.dispatch
        # Public methods are not called from here: nnx.tabulate jits them all, and their results are no arrays.
        backend = get_dispatch(self._explain_dispatch(T, dtype).name if name == "auto" else name, self._platform)
        return _Plan(self.config, auto_mesh(self.mesh), self._layout, backend, self.kernels, self.replica_choice)


def check_layer_dtype(dtype: Any) -> None:
    """Refuse a dtype that the weights of a layer cannot have.

    Raises:
        ValueError: it is none of float32, bfloat16, float16 and float64, or float64 where JAX has no 64-bit numbers.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"dtype is float32, bfloat16, float16 or float64; got {dtype!r:.80}")
    if name == "float64" and not jax.config.jax_enable_x64:
        raise ValueError('dtype float64 needs 64-bit numbers: jax.config.update("jax_enable_x64", True)')


def check_expert_axes(expert_axes: tuple[str, ...] | str) -> None:
    """Refuse expert axes that no code path serves.

    Raises:
        ValueError: not ("ep",), ("ep", "tp") or ("dp", "ep").
    """
    if isinstance(expert_axes, str) or tuple(expert_axes) not in ((EP,), (EP, TP), (DP, EP)):
        raise ValueError(f'expert_axes is ("ep",), ("ep", "tp") or ("dp", "ep"); got {expert_axes!r}')


@partial(jax.jit, static_argnames="plan")
def _forward(
    x_TD: jax.Array,
    router_TD: jax.Array,
    mask_T: jax.Array,
    expert_ids_TK: jax.Array | None,
    params: dict[str, jax.Array],
    *,
    plan: _Plan,
) -> tuple[jax.Array, MoEStats]:
    """The routed experts as one shard_map over all axes; tokens are padded to split evenly."""
    layout, config = plan.layout, plan.config
    token_axes = plan.dispatch.token_axes(layout)
    T = x_TD.shape[0]
    padding = layout.tokens_per_device(T, token_axes) * layout.size(token_axes) - T
    x_TD, router_TD = (jnp.pad(y_TD, ((0, padding), (0, 0))) for y_TD in (x_TD, router_TD))
    mask_T = jnp.pad(mask_T, (0, padding))
    if expert_ids_TK is not None:
        expert_ids_TK = jnp.pad(expert_ids_TK, ((0, padding), (0, 0)), constant_values=-1)
    width_axis = layout.partial_axes
    expert_specs = {
        "w_gate_up": P(layout.expert_axes, None, width_axis),
        "w_down": P(layout.expert_axes, None, width_axis),
        "b_gate_up": P(layout.expert_axes, None, width_axis),
        "b_down": P(layout.expert_axes),
        "near_slots": P(layout.expert_axes),
        "near_counts": P(layout.expert_axes),
    }

    def local(
        x_TD: jax.Array,
        router_TD: jax.Array,
        mask_T: jax.Array,
        given_TK: jax.Array | None,
        params: dict[str, jax.Array],
    ) -> tuple[jax.Array, MoEStats]:
        logits_TE = router_logits(router_TD, params, config.router)
        ids_TK, weights_TK = choose_experts(logits_TE, params, config.num_experts_per_tok, config.router, given_TK)
        first = jax.lax.axis_index(token_axes) * len(ids_TK) if token_axes else 0
        slots_TK = _choose_replicas(x_TD, ids_TK, first, params, plan)
        slots_TK = jnp.where(mask_T[:, None], slots_TK, -1)
        y_TD, dispatched = plan.dispatch.run(
            x_TD, slots_TK, weights_TK, _experts(params, plan), layout, config.weights_on_input
        )
        sums: RouterSums = jax.lax.psum(router_sums(logits_TE, ids_TK, mask_T), token_axes)
        return y_TD.astype(x_TD.dtype), MoEStats(
            expert_counts=sums.expert_counts,
            expert_ids=jnp.where(mask_T[:, None], ids_TK, -1),
            dispatch_rounds=dispatched.rounds,
            rows_sent=dispatched.rows_sent_n[None, None, None],
            load_balancing_loss=load_balancing_loss(sums),
            router_z_loss=router_z_loss(sums),
        )

    axes = layout.axes
    stats_specs: Any = dict.fromkeys(MoEStats._fields, P()) | {
        "expert_ids": P(token_axes),
        "rows_sent": P(axes.dp, axes.tp, axes.ep),
    }
    y_TD, stats = jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(*[P(token_axes)] * 4, {name: expert_specs.get(name, P()) for name in params}),
        out_specs=(P(token_axes), MoEStats(**stats_specs)),
        check_vma=False,
    )(x_TD, router_TD, mask_T, expert_ids_TK, params)
    return y_TD[:T], stats._replace(expert_ids=stats.expert_ids[:T])


def _experts(params: dict[str, jax.Array], plan: _Plan) -> Experts:
    """The local experts as a dispatch applies them to rows grouped by slot."""
    config = plan.config
    stacks = {name: params[name] for name in ("w_gate_up", "w_down", "b_gate_up", "b_down") if name in params}
    if "b_down" in stacks and plan.layout.partial_axes:
        # The results are partial sums over tp: one rank adds the bias for all.
        first = jax.lax.axis_index(plan.layout.partial_axes) == 0
        stacks["b_down"] = jnp.where(first, stacks["b_down"], 0)

    def apply(
        stacks: dict[str, jax.Array], rows_RD: jax.Array, sizes_p: jax.Array, dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        return expert_mlp(
            rows_RD,
            stacks["w_gate_up"],
            stacks["w_down"],
            sizes_p,
            b_gate_up_p2F=stacks.get("b_gate_up"),
            b_down_pD=stacks.get("b_down"),
            activation=config.activation,
            limit=config.activation_limit,
            out_dtype=dtype,
            backend=plan.kernels,
            device_kind=plan.mesh.devices.flat[0].device_kind,
        )

    return Experts(apply, stacks)


def _choose_replicas(
    x_TD: jax.Array, ids_TK: jax.Array, first_token: int | jax.Array, params: dict[str, jax.Array], plan: _Plan
) -> jax.Array:
    """The physical slot of every choice, by the layer's replica choice."""
    slots_ER, counts_E = params["expert_to_slots"], params["replica_counts"]
    turn_TK = None
    if slots_ER.shape[1] > 1:
        random = plan.replica_choice == "random"
        turn_TK = token_draws(x_TD, ids_TK.shape[1]) if random else token_turns(ids_TK.shape, first_token)
    slots_TK = choose_slots(ids_TK, slots_ER, counts_E, turn_TK)
    # Each device has tokens of its own; where all have the same ones, all must choose alike and none is nearer.
    if "near_slots" in params and set(plan.layout.expert_axes) <= set(plan.dispatch.token_axes(plan.layout)):
        near_TK = choose_slots(ids_TK, params["near_slots"][0], params["near_counts"][0], turn_TK)
        # A state of a layer without these tables may have brought another placement than they were made for.
        slots_TK = jnp.where(params["slot_to_expert"][near_TK] == ids_TK, near_TK, slots_TK)
    return slots_TK
