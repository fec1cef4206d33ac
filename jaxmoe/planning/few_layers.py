"""`compile_few_layers`: the memory of both steps of a deep model, from programs of its first layers.

Layers of a model repeat: sixty of them compile for an hour, and all but the first few add the same arguments each. Two
programs are compiled, one with a repetition more than the other, and what that one takes more is counted for each repetition
left out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.checkpoint.mapping import layer_index
from jaxmoe.config import DecoderConfig
from jaxmoe.layers import param_specs
from jaxmoe.mesh import EP
from jaxmoe.models import Decoder
from jaxmoe.placement import ExpertPlacement
from jaxmoe.planning.exchanges import Exchange
from jaxmoe.planning.steps import CompiledStep, check_sizes, compile_model, model_to_compile


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountedStep:
    """The memory of one step of a model with all of its layers.

    Attributes:
        argument_bytes: bytes of weights, cache and inputs.
        temp_bytes: bytes of memory that it needs besides while it runs.
        wire_bytes: bytes that a device sends if every loop runs once.
        exchanges: collectives of the program with most layers, see `CompiledStep.exchanges`.
        layers: number of the model's layers.
        compiled: numbers of layers of the programs that were compiled, the fewest first; `layers` alone for all of them.
    """

    argument_bytes: int
    temp_bytes: int
    wire_bytes: float
    exchanges: tuple[Exchange, ...]
    layers: int
    compiled: tuple[int, ...]


def compile_few_layers(
    config: DecoderConfig | str | Path,
    mesh: Mesh,
    *,
    batch_size: int,
    prompt_length: int,
    max_length: int,
    every_layer: bool = False,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    expert_axes: tuple[str, ...] = (EP,),
    dispatch: str | Mapping[str, str] = "auto",
    kernels: str = "auto",
    dtype: Any = jnp.bfloat16,
    activations: str | None = None,
) -> dict[str, CountedStep]:
    """Compile what `compile_steps` does with the first layers alone, and count the others as their repetitions.

    Args:
        config, mesh, batch_size, prompt_length, max_length: arguments of `compile_steps`.
        every_layer: whether all layers are compiled after all, in one program.
        placement, expert_axes, dispatch, kernels, dtype, activations: arguments of `compile_steps`.

    Returns:
        The steps "prefill" and "decode".

    Raises:
        ValueError: model, mesh and arguments do not fit together.
    """
    model = model_to_compile(
        config,
        mesh,
        placement=placement,
        expert_axes=expert_axes,
        dispatch=dispatch,
        kernels=kernels,
        dtype=dtype,
        activations=activations,
    )
    check_sizes(model.config, batch_size, prompt_length, max_length)
    layers, sizes = len(model.layers), {"prompt_length": prompt_length, "max_length": max_length}
    first, period = repetition(_kinds(model))
    counts = [layers] if every_layer or first + 2 * period >= layers else [first + period, first + 2 * period]
    programs: list[dict[str, CompiledStep]] = []
    for count in reversed(counts):
        keep_layers(model, count)
        programs.insert(0, compile_model(model, batch_size=batch_size, **sizes))
    repetitions = (layers - counts[-1]) // period
    return {
        name: count_layers([steps[name] for steps in programs], repetitions, compiled=tuple(counts))
        for name in programs[-1]
    }


def repetition(kinds: Sequence[Any]) -> tuple[int, int]:
    """The number of layers before the repetition begins, and of those that are repeated to the end: the fewest to compile.

    >>> repetition("dddmmmm"), repetition("fsfsfs")
    ((3, 1), (0, 2))
    """
    best = (len(kinds), 1)
    for period in range(1, len(kinds) // 2 + 1):
        first = len(kinds) - period
        while first and kinds[first - 1] == kinds[first - 1 + period]:
            first -= 1
        first += (len(kinds) - first) % period
        if first + 2 * period < best[0] + 2 * best[1]:
            best = first, period
    return best


def keep_layers(model: Decoder, count: int) -> None:
    """Leave a model without values its first layers alone."""
    model.config = dataclasses.replace(model.config, layers=model.config.layers[:count])
    model.layers = nnx.List(model.layers[:count])


def _kinds(model: Decoder) -> list[Any]:
    """The config and the arrays of every layer, by which it is told from others."""
    arrays: list[list[tuple[Any, ...]]] = [[] for _ in model.layers]
    for spec in param_specs(model):
        index = layer_index(spec.path)
        if index is not None:
            arrays[index].append((spec.path.split(".", 2)[2], spec.shape, spec.dtype, spec.sharding))
    return list(zip(model.config.layers, arrays, strict=True))


def count_layers(programs: Sequence[CompiledStep], repetitions: int, *, compiled: tuple[int, ...]) -> CountedStep:
    """Count for each repetition left out of the last program what that has more than the first.

    Args:
        programs: program with a repetition less and program with all that were compiled; or one alone, of all layers.
        repetitions: repetitions that are left out.
        compiled: numbers of layers of the programs.
    """

    def counted(values: Sequence[float]) -> float:
        return values[-1] + repetitions * (values[-1] - values[0])

    return CountedStep(
        argument_bytes=int(counted([program.argument_bytes for program in programs])),
        temp_bytes=int(counted([program.temp_bytes for program in programs])),
        wire_bytes=counted([sum(each.wire_bytes for each in program.exchanges) for program in programs]),
        exchanges=programs[-1].exchanges,
        layers=int(counted(compiled)),
        compiled=compiled,
    )
