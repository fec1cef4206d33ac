"""The experts of a layer: their weights, stacked by slot, and their application to rows that are grouped by slot."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmoe.config import MoEConfig
from jaxmoe.dispatch import Experts
from jaxmoe.kernels.grouped_matmul import Work, combine_halves, expert_mlp
from jaxmoe.layers.param import ParamFactory, zeros
from jaxmoe.layers.weights import RoundingStack, local_matrices
from jaxmoe.mesh import axes_size
from jaxmoe.placement import ExpertPlacement


class ExpertStacks(NamedTuple):
    """The weights of a layer's experts, dim 0 the physical slots; X is the width of the experts' inputs.

    Also holds what describes them: their parameters, or their partition specs. The layer's parameters have these names;
    the two stacks of matrices are each a `QuantizedStack` where they are held packed.

    Attributes:
        w_gate_up: [P, 2, F, X]; [P, 1, F, X] for experts without a gate.
        w_down: [P, X, F].
        b_gate_up: [P, 2, F] or [P, 1, F]; None without biases.
        b_down: [P, X]; None without biases.
    """

    w_gate_up: Any
    w_down: Any
    b_gate_up: Any = None
    b_down: Any = None


def make_expert_stacks(
    config: MoEConfig,
    placement: ExpertPlacement,
    expert_axes: tuple[str, ...],
    width_axes: tuple[str, ...],
    *,
    param: ParamFactory,
) -> ExpertStacks:
    """Make the parameters of the experts.

    Args:
        config: sizes and activation.
        placement: experts in the slots for now.
        expert_axes: axes of the mesh that the slots are split over.
        width_axes: axes that F is split over; none for whole experts.
        param: factory of the layer's parameters.

    Raises:
        ValueError: F does not divide over `width_axes`, or the activation is unknown.
    """
    P, F, X = placement.num_slots, config.moe_intermediate_size, config.expert_input_size
    tp = axes_size(param.mesh, width_axes)
    if F % tp:
        raise ValueError(
            f"the expert width is split evenly over tp: moe_intermediate_size={F} is no multiple of "
            f'tp={tp}; use a tp that divides it, or expert_axes=("ep", "tp")'
        )
    combine_halves(config.activation, config.activation_limit, gated=config.gated)
    halves = 2 if config.gated else 1
    slots, width = tuple(placement.slot_to_expert.tolist()), width_axes or None
    w_gate_up = param((P, halves, F, X), expert_axes, None, width, None, slots=slots)
    w_down = param((P, X, F), expert_axes, None, width, slots=slots)
    if not config.bias:
        return ExpertStacks(w_gate_up, w_down)
    b_gate_up = param((P, halves, F), expert_axes, None, width, init=zeros, slots=slots)
    return ExpertStacks(w_gate_up, w_down, b_gate_up, param((P, X), expert_axes, init=zeros, slots=slots))


def expert_work(
    stacks: ExpertStacks, specs: ExpertStacks, config: MoEConfig, *, axis_sizes: Mapping[str, int], dtype: DTypeLike
) -> Work:
    """Name the work of a device's kernels.

    Args:
        stacks: weights of the whole mesh, or what stands for them.
        specs: their partition specs.
        config: config of the layer.
        axis_sizes: sizes of the mesh's axes.
        dtype: dtype of the activations.
    """
    w_gate_up, _ = local_matrices(stacks.w_gate_up, specs.w_gate_up, axis_sizes)
    w_down, activations = local_matrices(stacks.w_down, specs.w_down, axis_sizes)
    return Work.mlp(
        dtype,
        w_gate_up,
        w_down,
        biases=stacks.b_down is not None,
        activation=config.activation,
        limit=config.activation_limit,
        activations=activations,
    )


def local_experts(
    stacks: ExpertStacks, config: MoEConfig, *, partial_axes: tuple[str, ...], kernels: str, device_kind: str
) -> Experts:
    """This device's experts as a dispatch applies them: W_down (act(W_gate x) · W_up x) for the rows of each slot.

    Args:
        stacks: this device's part of the weights.
        config: config of the layer.
        partial_axes: axes of the mesh over which the results are partial sums.
        kernels: name of a backend of `jaxmoe.kernels.grouped_matmul`, or "auto".
        device_kind: kind of the device, as JAX names it.
    """
    if stacks.b_down is not None and partial_axes:
        # The results are partial sums over tp: one rank adds the bias for all.
        first = jax.lax.axis_index(partial_axes) == 0
        stacks = stacks._replace(b_down=jnp.where(first, stacks.b_down, 0))

    def apply(
        stacks: ExpertStacks, rows_TD: jax.Array, index_R: jax.Array | None, sizes_p: jax.Array, dtype: DTypeLike
    ) -> jax.Array:
        up, down, rounding = expert_matrices(stacks)
        return expert_mlp(
            rows_TD,
            up,
            down,
            sizes_p,
            index_R=index_R,
            b_gate_up_p2F=stacks.b_gate_up,
            b_down_pD=stacks.b_down,
            activation=config.activation,
            limit=config.activation_limit,
            out_dtype=dtype,
            zeros_beyond=False,
            backend=kernels,
            device_kind=device_kind,
            **rounding,
        )

    return Experts(apply, stacks)


def expert_matrices(stacks: ExpertStacks) -> tuple[Any, Any, dict[str, Any]]:
    """The two stacks as `expert_mlp` takes them, and its arguments for inputs that are rounded."""
    up, down = stacks.w_gate_up, stacks.w_down
    if not isinstance(up, RoundingStack) or not isinstance(down, RoundingStack):
        assert isinstance(up, RoundingStack) == isinstance(down, RoundingStack), "one of two stacks rounds its inputs"
        return up, down, {}
    assert up.activations == down.activations, f"{up.activations} and {down.activations}"
    rounding: dict[str, Any] = {"activations": down.activations, "split_over": down.split_over}
    if up.input_scales is not None:
        # Gate and up have one product: where their scales differ, the larger cuts nothing off of either.
        scales_p2 = jnp.stack([jnp.max(up.input_scales, axis=1), down.input_scales], axis=1)
        rounding["input_scales_p2"] = jnp.where(scales_p2 > 0, scales_p2, 1)  # padding slots have zeros
    return up.stack, down.stack, rounding
