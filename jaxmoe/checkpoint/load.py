"""`jaxmoe.load`: from a checkpoint directory to a model on the mesh."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmoe.checkpoint.blocks import Block, whole_tensor_blocks
from jaxmoe.checkpoint.execute import load_arrays
from jaxmoe.checkpoint.experts import expert_blocks
from jaxmoe.checkpoint.files import Checkpoint, open_checkpoint
from jaxmoe.checkpoint.plan import IgnoreRule, make_load_plan
from jaxmoe.config import DecoderConfig, read_config_json
from jaxmoe.layers import ParamSpec, param_specs, params_by_path
from jaxmoe.mesh import EP
from jaxmoe.models import Decoder, Family, get_family
from jaxmoe.placement import ExpertPlacement
from jaxmoe.progress import ProgressCallback, byte_progress

_DTYPES = ("float32", "bfloat16", "float16")


def load(
    path: str | Path,
    *,
    mesh: Mesh,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    dtype: str | None = None,
    expert_axes: tuple[str, ...] = (EP,),
    dispatch: str = "auto",
    kernels: str = "auto",
    progress: bool | ProgressCallback = False,
    check_finite: bool = False,
) -> Decoder:
    """Load a torch-format checkpoint onto a mesh; every device reads and holds its own experts only.

    Nothing is read until the whole plan holds: every tensor of the checkpoint is used or ignored
    by a named rule, and every parameter is filled exactly once.

    Args:
        path: a directory as transformers' ``save_pretrained`` writes it.
        mesh: from `jaxmoe.make_mesh`.
        placement: a strategy's name or an `ExpertPlacement` for all MoE layers, or one for each.
        dtype: of weights and activations, "float32", "bfloat16" or "float16"; None for the checkpoint's own.
        expert_axes: mesh axes that share the experts, see `jaxmoe.MoE`.
        dispatch: a backend of `jaxmoe.dispatch`, or "auto".
        kernels: a backend of `jaxmoe.kernels.grouped_matmul`, or "auto".
        progress: True draws a bar on stderr; a callable is given (bytes done, bytes in all).
        check_finite: refuse a checkpoint with infinities or NaNs in it.

    Returns:
        The model, its `load_report` telling what was read and what each device holds.

    Raises:
        FileNotFoundError: no checkpoint there, or a part of it is missing.
        ValueError: the checkpoint, the mesh and the arguments do not fit together.

    Example:
        >>> mesh = jaxmoe.make_mesh(dp=2, tp=2, ep=2)  # doctest: +SKIP
        >>> model = jaxmoe.load("path/to/checkpoint", mesh=mesh)  # doctest: +SKIP
        >>> model([[1, 2, 3]]).shape  # doctest: +SKIP
        (1, 3, 151936)
    """
    path = Path(path)
    raw_config = read_config_json(path)
    family = get_family(raw_config["model_type"])
    try:
        config = family.read_config(raw_config)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from error
    checkpoint = open_checkpoint(path)
    model = Decoder(
        config,
        mesh=mesh,
        placement=placement,
        expert_axes=expert_axes,
        dispatch=dispatch,
        kernels=kernels,
        dtype=jnp.dtype(_choose_dtype(dtype, config, checkpoint, family)),
        source=path,
    )
    specs = {spec.path: spec for spec in param_specs(model)}
    plan = make_load_plan(
        checkpoint,
        specs.values(),
        model_blocks(specs, family, checkpoint),
        ignore=[IgnoreRule(name=name, pattern=pattern) for name, pattern in family.ignored.items()],
        expert_params=[path for path in specs if _is_expert_stack(path)],
    )
    with byte_progress(f"loading {path.name}", progress) as report_bytes:
        arrays, model.load_report = load_arrays(plan, check_finite=check_finite, progress=report_bytes)
    for name, param in params_by_path(model).items():
        param.set_value(arrays[name])
    return model


def model_blocks(specs: dict[str, ParamSpec], family: Family, checkpoint: Checkpoint) -> Iterator[Block]:
    """Which tensor of the checkpoint fills which part of which parameter.

    Args:
        specs: the model's parameters by path.
        family: whose names the tensors have.
        checkpoint: what is there; it decides between a family's spellings and expert layouts.
    """
    for path, spec in specs.items():
        layer = re.match(r"layers\.(\d+)\.", path)
        index = int(layer[1]) if layer else None
        if path.endswith(".moe.w_gate_up"):
            down = specs[path.removesuffix("w_gate_up") + "w_down"]
            assert index is not None
            yield from expert_blocks(spec, down, family.experts.for_layer(index), checkpoint.tensors)
        elif not _is_expert_stack(path):
            template = path if index is None else path.replace(f"layers.{index}.", "layers.{layer}.", 1)
            names = [name.format(layer=index) for name in family.tensors[template]]
            name = next((name for name in names if name in checkpoint.tensors), names[0])
            yield from whole_tensor_blocks(spec, name, checkpoint.tensors.get(name))


def _is_expert_stack(path: str) -> bool:
    return path.endswith((".moe.w_gate_up", ".moe.w_down"))


def _choose_dtype(dtype: Any, config: DecoderConfig, checkpoint: Checkpoint, family: Family) -> str:
    if dtype is not None:
        if jnp.dtype(dtype).name not in _DTYPES:
            raise ValueError(f"dtype is one of {', '.join(_DTYPES)}, or None for the checkpoint's own; got {dtype!r}")
        return jnp.dtype(dtype).name
    if config.dtype is not None:
        if config.dtype not in _DTYPES:
            raise ValueError(
                f"config.json gives dtype {config.dtype!r}; a model runs in {', '.join(_DTYPES)}: pass one as dtype="
            )
        return config.dtype
    embedding = checkpoint.tensors.get(family.tensors["embed.weight"][0])
    found = None if embedding is None or embedding.dtype is None else embedding.dtype.name
    return found if found in _DTYPES else "float32"
