"""`warm_engine` and `warm_batch`: the programs of a model compiled into JAX's cache, before its weights are here."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmoe.checkpoint.mapping import pack_model
from jaxmoe.checks import integer, one_of
from jaxmoe.generation.continuous import plan_sizes
from jaxmoe.generation.continuous.programs import SlotPrograms
from jaxmoe.generation.params import SamplingParams
from jaxmoe.generation.programs import Programs, Record, Shape
from jaxmoe.generation.sampling import Mode
from jaxmoe.layers import param_specs
from jaxmoe.mesh import EP
from jaxmoe.models import Decoder
from jaxmoe.models.kernels import try_kernels
from jaxmoe.models.padding import bucket_length
from jaxmoe.placement import ExpertPlacement
from jaxmoe.planning.planned import PlannedCheckpoint


def abstract_checkpoint_model(
    path: str | Path,
    mesh: Mesh,
    *,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    dtype: Any = None,
    quantized: str | None = None,
    activations: str | None = None,
    expert_axes: tuple[str, ...] = (EP,),
    dispatch: str | Mapping[str, str] = "auto",
    kernels: str = "auto",
) -> Decoder:
    """Make the model that `jaxmoe.load` would give with these arguments, without weights; config.json alone will do.

    Raises:
        ValueError: checkpoint, mesh and arguments do not fit together.
        FileNotFoundError: there is no checkpoint there.
    """
    quantized = one_of("quantized", quantized or "keep", ("keep", "dequantize"))
    if activations not in (None, "checkpoint"):
        raise ValueError(f'activations is "checkpoint" or None; got {activations!r}')
    planned = PlannedCheckpoint.read(path)
    model = Decoder(
        planned.config,
        mesh=mesh,
        placement=placement,
        expert_axes=expert_axes,
        dispatch=dispatch,
        kernels=kernels,
        dtype=dtype or planned.config.dtype or jnp.bfloat16,
    )
    if quantized == "keep":
        mapped = planned.onto({spec.path: spec for spec in param_specs(model)})
        choice = pack_model(model, mapped, rounding=activations is not None)
        if activations is not None:
            choice.check_rounding(planned.directory)
    try_kernels(model, mesh, model.dtype, kernels)
    return model


def warm_engine(
    model: Decoder,
    *,
    num_slots: int | None = None,
    num_pages: int | None = None,
    max_length: int | None = None,
    record: Record = "counts",
) -> Iterator[str]:
    """Compile every program of a continuous engine; with `jaxmoe.enable_compile_cache`, the next process finds them.

    Args:
        model: model without weights, or with them.
        num_slots, num_pages, max_length: arguments of the engine.
        record: part of its routing that each step tells: "counts" for what watches experts, as ``jaxmoe serve`` does.

    Yields:
        The name of each program once it is compiled.

    Raises:
        ValueError: a number is out of range.
    """
    sizes, layout = plan_sizes(
        model, num_slots=num_slots, page_size=16, num_pages=num_pages, prefill_chunk=256, max_length=max_length
    )
    programs = SlotPrograms(model, sizes, layout)
    yield from programs.compile_all(programs.bind(model), record=record)


def warm_batch(
    model: Decoder, *, batch_size: int, prompt_length: int, max_new_tokens: int, params: SamplingParams | None = None
) -> Iterator[str]:
    """Compile the programs that `jaxmoe.generate` runs for a batch of these sizes.

    Args:
        model: model without weights, or with them.
        batch_size: number of prompts.
        prompt_length: tokens of the longest.
        max_new_tokens: most tokens to generate for each.
        params: settings by which tokens are chosen; greedy by default.

    Yields:
        The name of each program once it is compiled.

    Raises:
        ValueError: a number is out of range.
    """
    limit = model.config.max_position_embeddings
    prompt_length = integer("prompt_length", prompt_length, least=1, most=limit)
    max_new_tokens = integer("max_new_tokens", max_new_tokens, least=1, most=limit - prompt_length)
    shape = Shape(
        rows=model.padded_batch(integer("batch_size", batch_size, least=1)),
        prompt=bucket_length(prompt_length, limit),
        cache=bucket_length(prompt_length + max_new_tokens, limit),
    )
    programs = Programs(model.mesh)
    leaves = programs.bind(model)
    programs.init_cache(leaves, shape)
    yield "an empty cache"
    programs.prefill(leaves, shape, "nothing")
    yield f"prefill of {shape.rows} x {shape.prompt} tokens"
    if max_new_tokens > 1:
        programs.decode(leaves, shape, "nothing")
        yield f"decode step of {shape.rows} rows in {shape.cache} positions"
    programs.sampler(shape, model.config.vocab_size, Mode.of(params or SamplingParams()))
    yield "a sampler"
