"""`compile_steps`: prefill and a decode step compiled for GPUs that are not there."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmoe.checkpoint.mapping import pack_model
from jaxmoe.config import DecoderConfig
from jaxmoe.generation.programs import Programs, Shape
from jaxmoe.layers import param_specs
from jaxmoe.mesh import EP
from jaxmoe.models import Decoder
from jaxmoe.placement import ExpertPlacement
from jaxmoe.planning.exchanges import Exchange, read_exchanges
from jaxmoe.planning.planned import PlannedCheckpoint

# An instruction of a compiled program: what it gives, and its name.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<shape>.*?) (?P<op>[\w-]+)\(", re.MULTILINE)
_ARRAY = re.compile(r"[a-z]+\d+\[([\d,]*)\]")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """One program of a model, as it would run on each device.

    Attributes:
        argument_bytes: bytes of weights, cache and inputs.
        temp_bytes: bytes of memory that it needs besides while it runs.
        collectives: number of instructions between devices, by name.
        arrays: number of all instructions, by (instruction, shape of a result).
        text: text of the whole program, as XLA writes it.
        mesh_shape: (axis, size) of each axis of the mesh.
    """

    argument_bytes: int
    temp_bytes: int
    collectives: dict[str, int]
    arrays: dict[tuple[str, tuple[int, ...]], int]
    text: str
    mesh_shape: tuple[tuple[str, int], ...]

    @cached_property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Every collective with its bytes, the axes that it runs along, and the work that hides it."""
        return read_exchanges(self.text, self.mesh_shape)


def compile_steps(
    config: DecoderConfig | str | Path,
    mesh: Mesh,
    *,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    expert_axes: tuple[str, ...] = (EP,),
    dispatch: str | Mapping[str, str] = "auto",
    kernels: str = "auto",
    dtype: Any = jnp.bfloat16,
    activations: str | None = None,
    batch_size: int,
    prompt_length: int,
    max_length: int,
) -> dict[str, CompiledStep]:
    """Compile what `jaxmoe.generate` runs, without weights and without devices.

    Args:
        config: config of the model, whose weights are then plain; or a checkpoint, given as for `jaxmoe.plan`, whose
            quantized weights stay packed as `jaxmoe.load` keeps them. A config.json alone will do.
        mesh: mesh over devices from `gpu_topology`, or any others.
        placement, expert_axes, dispatch, kernels, dtype: arguments of `jaxmoe.load`. In one process "mosaic_gpu"
            compiles for one generation of GPUs, the first that it was asked for.
        activations: "checkpoint" for a checkpoint's packed weights whose inputs are rounded as it asks, None for inputs as
            they are, as for `jaxmoe.load`.
        batch_size: number of sequences.
        prompt_length: number of tokens of each in the prefill.
        max_length: number of tokens of each that the cache holds.

    Returns:
        The programs "prefill" and "decode".

    Raises:
        ValueError: model, mesh and arguments do not fit together, or `activations` would round the inputs of no weight.
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
    return compile_model(model, batch_size=batch_size, prompt_length=prompt_length, max_length=max_length)


def model_to_compile(
    config: DecoderConfig | str | Path,
    mesh: Mesh,
    *,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    expert_axes: tuple[str, ...] = (EP,),
    dispatch: str | Mapping[str, str] = "auto",
    kernels: str = "auto",
    dtype: Any = jnp.bfloat16,
    activations: str | None = None,
) -> Decoder:
    """Make the model of `compile_steps`, whose arguments these are, without values."""
    if activations not in (None, "checkpoint"):
        raise ValueError(f'activations is "checkpoint" or None; got {activations!r}')
    checkpoint = None
    if not isinstance(config, DecoderConfig):
        checkpoint = PlannedCheckpoint.read(config)
        config = checkpoint.config
    elif activations is not None:
        raise ValueError(
            'activations="checkpoint" rounds as a checkpoint asks; got a config, whose weights are plain; give the '
            "checkpoint's path, or leave activations out"
        )
    model = Decoder(
        config,
        mesh=mesh,
        placement=placement,
        expert_axes=expert_axes,
        dispatch=dispatch,
        kernels=kernels,
        dtype=dtype,
    )
    if checkpoint is not None:
        mapped = checkpoint.onto({spec.path: spec for spec in param_specs(model)})
        choice = pack_model(model, mapped, rounding=activations is not None)
        if activations is not None:
            choice.check_rounding(checkpoint.directory)
    return model


def check_sizes(config: DecoderConfig, batch_size: int, prompt_length: int, max_length: int) -> None:
    """Refuse sizes that no step of the model has."""
    if batch_size < 1 or not 1 <= prompt_length <= max_length <= config.max_position_embeddings:
        raise ValueError(
            "there is at least one sequence, with at least one token, and 1 <= prompt_length <= max_length <= "
            f"max_position_embeddings ({config.max_position_embeddings}); got batch_size {batch_size}, prompt_length "
            f"{prompt_length} and max_length {max_length}"
        )


def compile_model(model: Decoder, *, batch_size: int, prompt_length: int, max_length: int) -> dict[str, CompiledStep]:
    """Compile both steps of a model without values, as `compile_steps` says."""
    mesh = model.mesh
    programs = Programs(mesh)
    leaves = programs.bind(model)
    shape = Shape(rows=model.padded_batch(batch_size), prompt=prompt_length, cache=max_length)
    # Where there is no GPU, Pallas Triton asks the mesh what to compile for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        programs.init_cache(leaves, shape)
        programs.prefill(leaves, shape, "nothing")
        programs.decode(leaves, shape, "nothing")
    sizes = tuple(mesh.shape.items())
    return {
        name: _step(programs.compiled[name, *rest], sizes) for name, *rest in programs.compiled if name != "init_cache"
    }


def _step(compiled: jax.stages.Compiled, mesh_shape: tuple[tuple[str, int], ...]) -> CompiledStep:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    arrays: Counter[tuple[str, tuple[int, ...]]] = Counter()
    collectives: Counter[str] = Counter()
    for instruction in _INSTRUCTION.finditer(text):
        op = instruction["op"].removesuffix("-start")
        if op.endswith("-done"):
            continue
        collectives[op] += op in _COLLECTIVES
        for dims in _ARRAY.findall(instruction["shape"]):
            arrays[op, tuple([int(dim) for dim in dims.split(",") if dim])] += 1
    return CompiledStep(
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        collectives={op: count for op, count in collectives.items() if count},
        arrays=dict(arrays),
        text=text,
        mesh_shape=mesh_shape,
    )
