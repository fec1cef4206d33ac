"""Finding what an optimizer keeps for each weight of an expert, so that it can go where the expert goes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import jax
from flax import nnx

from jaxmoe.layers.moe import MoE
from jaxmoe.layers.specs import owner_of

Path = tuple[Any, ...]
Moment = tuple[nnx.Variable[Any], nnx.Variable[Any]]


def expert_moments(module: nnx.Module, layers: Sequence[MoE], optimizer: Any) -> list[list[Moment]]:
    """Find the arrays of an optimizer that lie by the placements of a module's layers.

    Args:
        module: module that the optimizer was made for.
        layers: MoE layers in it.
        optimizer: `nnx.Optimizer`, or a state that ``tx.init(nnx.state(module, ...))`` of optax gave.

    Returns:
        For each layer what the optimizer has in the shape of one of its stacks, as (Variable of the optimizer, stack).

    Raises:
        ValueError: the optimizer is for another module, or has arrays that cannot follow the experts.
    """
    stacks: dict[Path, tuple[int, nnx.Variable[Any]]] = {}
    names: set[Path] = set()
    for path, _ in cast(Iterable[tuple[Path, Any]], nnx.to_flat_state(nnx.state(module))):
        names.add(path)
        owner = owner_of(module, path)
        of_slots = [*owner.expert_stacks(), *owner.expert_factors()] if isinstance(owner, MoE) else []
        for stack in of_slots:
            if stack is getattr(owner, path[-1]):
                stacks[path] = next(i for i, layer in enumerate(layers) if layer is owner), stack
    found: list[list[Moment]] = [[] for _ in layers]
    known, unknown = False, None
    for path, leaf in _leaves(optimizer):
        known |= path in names
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        shape = getattr(value, "shape", ())
        if path not in names and math.prod(shape) > 1:
            unknown = path
        # A single number stands for a weight that has no such array, as in Adafactor's state.
        if path not in stacks or math.prod(shape) == 1:
            continue
        layer, stack = stacks[path]
        name = ".".join(map(str, path))
        if not isinstance(leaf, nnx.Variable):
            raise ValueError(
                f"an optimizer's arrays follow the experts where nnx.Variables hold them, and for {name} it has a bare "
                f"{type(leaf).__name__}; give an nnx.Optimizer, or a state from tx.init(nnx.state(module, nnx.Param))"
            )
        if shape != stack.get_value().shape:
            raise ValueError(
                f"an optimizer's arrays follow the experts where they have the shape of the stack: {name} is "
                f"{stack.get_value().shape} and the optimizer has {shape} for it; train on without a rebalance, or make a "
                "new optimizer after it and leave this one out"
            )
        found[layer].append((leaf, stack))
    if unknown is not None and not known:
        raise ValueError(
            f"an optimizer is made for the module that is rebalanced, whole: it has {'.'.join(map(str, unknown))!r}, "
            f"which this {type(module).__name__} has not; give jaxmoe.rebalance the module that the optimizer was made for"
        )
    return found


def _leaves(optimizer: Any) -> list[tuple[Path, Any]]:
    """List what an optimizer holds, each by the path of its weight: the keys of dicts that end the path in the state."""
    state = optimizer.opt_state if isinstance(optimizer, nnx.Optimizer) else optimizer
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    named = []
    for path, leaf in leaves:
        name: list[Any] = []
        for key in reversed(path):
            if not isinstance(key, jax.tree_util.DictKey):
                break
            name.insert(0, key.key)
        named.append((tuple(name), leaf))
    return named
