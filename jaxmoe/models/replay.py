"""Replaying recorded choices of experts, so that what is computed later sees the routing of what was recorded."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.config import MoEConfig
from jaxmoe.mesh import named, put
from jaxmoe.placement import RoutingTrace
from jaxmoe.placement.trace import check_choices


class ReplayedRouting(nnx.Variable):
    """A part of a `RoutingReplay`: an array that programs read, so that another trace compiles nothing again."""


class RoutingReplay(nnx.Module):
    """The choices that a model takes instead of its routers' own; see `Decoder.replay_routing`.

    Attributes:
        expert_ids: int32 [T, L, K], choices of each token, -1 in all K where the router chooses.
        window_sizes: int32 [W], number of tokens of each step of the trace.

    Args:
        trace: trace to replay; see `check_trace`.
        layers: configs of the model's layers of routed experts.
        mesh: mesh of the model, each of whose devices holds all choices.

    Raises:
        ValueError: the trace is not of such layers.
    """

    def __init__(self, trace: RoutingTrace, layers: Sequence[MoEConfig], mesh: Mesh):
        expert_ids, window_sizes = check_trace(trace, layers)
        self.expert_ids = ReplayedRouting(put(expert_ids, named(mesh)))
        self.window_sizes = ReplayedRouting(put(window_sizes.astype(np.int32), named(mesh)))

    def of_call(self, B: int, S: int, rows: int, length: int) -> jax.Array:
        """Lay out the whole trace as the choices of one call, int32 [rows, length, L, K], of B rows of S tokens and padding.

        Raises:
            ValueError: the trace is of another number of tokens.
            RuntimeError: the choices would become a constant of a program.
        """
        ids_TLK = self.expert_ids[...]
        if ids_TLK.shape[0] != B * S:
            raise ValueError(
                f"a call replays a trace of as many tokens as it has, row by row: the trace has {ids_TLK.shape[0]} tokens, "
                f"and the call {B} x {S}; take the call's part of a longer trace with RoutingTrace.windows, or put a "
                f"generation's steps in rows with RoutingTrace.by_sequence"
            )
        if _is_staged() and not isinstance(ids_TLK, jax.core.Tracer):
            raise RuntimeError(
                "replayed choices are arguments of a program, and this one closes over the model, so that they would be "
                "compiled into it: hand the model to your function, as nnx.jit(f)(model, tokens) does"
            )
        ids_BSLK = ids_TLK.reshape(B, S, *ids_TLK.shape[1:])
        return jnp.pad(ids_BSLK, ((0, rows - B), (0, length - S), (0, 0), (0, 0)), constant_values=-1)

    def steps(self) -> "ReplayedSteps":
        """Split the trace into the steps of one generation."""
        return ReplayedSteps(np.asarray(self.expert_ids[...]), np.asarray(self.window_sizes[...]))


class ReplayedSteps:
    """Hands out a trace step by step to one run of `jaxmoe.generate`: the prefill, and then each decode step.

    Args:
        ids_TLK: int32, choices of all tokens, step after step.
        sizes_W: number of tokens of each step.
    """

    def __init__(self, ids_TLK: np.ndarray, sizes_W: np.ndarray):
        self._steps = np.split(ids_TLK, np.cumsum(sizes_W)[:-1])
        self._next = 0

    @property
    def choices_shape(self) -> tuple[int, int]:
        """Number of layers and of choices, (L, K)."""
        return self._steps[0].shape[1:]

    def check_length(self, max_new_tokens: int) -> None:
        """Refuse a trace of more steps than a generation can take.

        Raises:
            ValueError: see above.
        """
        if len(self._steps) > max_new_tokens:
            raise ValueError(
                f"a generation replays one step of the trace for each new token at most: the trace has "
                f"{len(self._steps)} steps and max_new_tokens is {max_new_tokens}; replay what was recorded of one "
                f"generation with the same max_new_tokens (RoutingTrace.windows takes a part)"
            )

    def take(self, mask: np.ndarray) -> np.ndarray:
        """Take the choices of the next step: int32 [*mask.shape, L, K], -1 where `mask` is False.

        Args:
            mask: bool array, True for each token of the step; the trace has them in this order.

        Raises:
            ValueError: the trace has no more step, or one of another number of tokens.
        """
        tokens = int(mask.sum())
        has = f"{len(self._steps[self._next])} tokens" if self._next < len(self._steps) else "no such step"
        if has != f"{tokens} tokens":
            raise ValueError(
                f"a replayed generation takes the steps that were recorded: step {self._next} has {tokens} tokens here, "
                f"and the trace has {has}; give the prompts, tokens, seeds and ends of text of the recorded generation"
            )
        ids = np.full((*mask.shape, *self.choices_shape), -1, np.int32)
        ids[mask] = self._steps[self._next]
        self._next += 1
        return ids

    def check_end(self) -> None:
        """Refuse a generation that ended before its trace.

        Raises:
            ValueError: see above.
        """
        if self._next < len(self._steps):
            raise ValueError(
                f"a replayed generation takes the steps that were recorded: the trace has {len(self._steps)}, and all "
                f"rows had ended after {self._next}; give the ends of text of the recorded generation (ignore_eos=True if "
                f"it had none)"
            )


def check_trace(trace: RoutingTrace, layers: Sequence[MoEConfig]) -> tuple[np.ndarray, np.ndarray]:
    """Check a trace that was recorded of a model with these layers, and give its choices and window sizes.

    Raises:
        ValueError: there is no such layer; the trace has counts alone; its layers, experts or choices are not as many; or
            what it has of a token is no choice.
    """
    if not layers:
        raise ValueError("no layer of this model has routed experts: there is no routing to replay")
    if any(layer.zero_experts for layer in layers):
        raise ValueError(
            "a replay needs all choices of a token, and a trace has none of zero experts, which this model has; give "
            "choices to model.logits_and_stats, whose statistics have them all"
        )
    if trace.expert_ids is None or trace.window_sizes is None:
        raise ValueError(
            "a replay needs the choices of every token, and this trace has counts only; record it with "
            "model.record_routing(token_ids=True)"
        )
    has = (trace.num_layers, trace.num_experts, trace.expert_ids.shape[2])
    needs = (
        len(layers),
        max(layer.num_experts for layer in layers),
        max(layer.num_experts_per_tok for layer in layers),
    )
    if has != needs:
        raise ValueError(
            "a trace is replayed by a model of the same layers: the trace has {} MoE layers, {} experts and {} choices a "
            "token, and the model {}, {} and {}".format(*has, *needs)
        )
    for index, layer in enumerate(layers):
        K, ids_TK = layer.num_experts_per_tok, trace.expert_ids[:, index]
        try:
            check_choices(ids_TK[:, :K], layer.num_experts)
            if (ids_TK[:, K:] >= 0).any():
                raise ValueError(f"a token has {K} choices here, and the trace has more")
        except ValueError as error:
            raise ValueError(f"MoE layer {index} of the trace: {error}") from None
    return trace.expert_ids, trace.window_sizes


def of_layers(ids_BSLK: jax.Array | None, layers: Sequence[MoEConfig], tokens: tuple[int, ...]) -> list:
    """Split the choices [B, S, L, K] of all layers by layer; None for each where there are none.

    Raises:
        ValueError: they are of another shape.
    """
    if ids_BSLK is None:
        return [None] * len(layers)
    shape = (*tokens, len(layers), max((layer.num_experts_per_tok for layer in layers), default=0))
    if ids_BSLK.shape != shape:
        raise ValueError(f"expert_ids are integers [B, S, L, K], here {list(shape)}; got {list(ids_BSLK.shape)}")
    return [ids_BSLK[:, :, index, : layer.num_experts_per_tok] for index, layer in enumerate(layers)]


def _is_staged() -> bool:
    """Whether JAX makes a program of what is computed here, and not only a gradient."""
    return isinstance(jnp.add(0, 0), jax.core.Tracer)
