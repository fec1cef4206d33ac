"""A check that a module has the arrays that it is about to use, with words for where it does not."""

from weakref import WeakSet

import jax
from flax import nnx

from jaxmoe.layers.expert_stack import ExpertStack, check_filled_by

# Not an attribute: everything set on an nnx module is part of what its compiled programs are found again by.
_MOVED: WeakSet[nnx.Module] = WeakSet()


def mark_moved(model: nnx.Module) -> None:
    """Note that `jaxmoe.move` took the model's weights to another one."""
    _MOVED.add(model)


def check_usable(module: nnx.Module, *, abstract: bool = False) -> None:
    """Refuse a module whose arrays are gone, before a program is given one of them.

    JAX refuses a deleted array too where it is given one by one, but a program that was compiled ahead of its call takes
    the process down with some versions.

    Args:
        module: module that is about to be used.
        abstract: whether parameters with shapes and without values are accepted.

    Raises:
        RuntimeError: its weights were moved to another model, donated or deleted, or it never had any.
        ValueError: a layer's experts were filled by another placement than the layer has.
    """
    kind = type(module).__name__
    if module in _MOVED:
        raise RuntimeError(
            f"jaxmoe.move used this {kind} up: its weights went to the model that move returned; use that one"
        )
    state = dict(nnx.to_flat_state(nnx.state(module)))
    for path, variable in state.items():
        for value in jax.tree.leaves(variable.get_value()):
            name = ".".join(map(str, path))
            if isinstance(value, jax.ShapeDtypeStruct) and not abstract:
                raise RuntimeError(
                    f"this {kind} has no weights: {name} is a shape without a value (from rngs=None, nnx.eval_shape or a "
                    "moved model); load a checkpoint into it, or make it with rngs=nnx.Rngs(...)"
                )
            if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.is_deleted():
                raise RuntimeError(
                    f"the arrays of this {kind} are gone: {name} was donated (jax.jit(..., donate_argnums=...)) or deleted; "
                    "put the result of the function that took it into the module (nnx.update), or give such a function "
                    "a copy (nnx.clone(module, arrays=True))"
                )
    if abstract:  # to be filled, or looked at only
        return
    for path, variable in state.items():
        table = state.get((*path[:-1], "slot_to_expert"))
        if isinstance(variable, ExpertStack) and table is not None:
            check_filled_by(".".join(map(str, path)), variable, table.get_value())
