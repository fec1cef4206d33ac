"""A model that is not made: no device is asked for, nothing is allocated and no backend starts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxmoe.checkpoint.mapping.names import layer_index
from jaxmoe.config import DecoderConfig, MoEConfig
from jaxmoe.layers import ParamSpec, param_specs
from jaxmoe.mesh import AXES, EP
from jaxmoe.models import Decoder
from jaxmoe.models.parts import is_expert_stack
from jaxmoe.placement import ExpertPlacement


def abstract_model(
    config: DecoderConfig,
    *,
    sizes: Mapping[str, int],
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    expert_axes: tuple[str, ...] = (EP,),
    dtype: Any = jnp.float32,
    one_of_alike: bool = False,
) -> Decoder:
    """The model that this config, mesh and placement would give; its parameters have shapes and shardings, no values.

    Args:
        config: config of the model.
        sizes: sizes of the mesh axes, as {"dp": 1, "tp": 2, "ep": 4}.
        placement, expert_axes, dtype: arguments as for `jaxmoe.load`.
        one_of_alike: whether layers of the same config and placement are one object, see `Decoder`.

    Raises:
        ValueError: they do not fit together.
    """
    mesh: Any = AbstractMesh(tuple([sizes[axis] for axis in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Decoder(
        config, mesh=mesh, placement=placement, expert_axes=expert_axes, dtype=dtype, one_of_alike=one_of_alike
    )


def count_parameters(config: DecoderConfig) -> tuple[int, int]:
    """Count the parameters of a model, and those that one token meets.

    Args:
        config: config of the model.

    Returns:
        All of them, and all but the routed experts that a token does not go to and the layers for multi-token prediction.
        Where it may go to zero experts it is the mean, of all chosen as often. The embedding is counted whole, as is usual.
    """
    total = active = 0
    for path, spec in abstract_specs(config).items():
        count = math.prod(spec.shape)
        total += count
        index = layer_index(path)
        if index is not None and index >= config.num_main_layers:
            continue
        if is_expert_stack(path):
            assert index is not None, f"{path}: experts outside a layer"
            moe = config.layers[index].feed_forward
            assert isinstance(moe, MoEConfig), f"{path}: a stack of no experts"
            count = round(count // moe.num_experts * moe.experts_met)
        active += count
    return total, active


def abstract_specs(config: DecoderConfig, dtype: Any = jnp.float32) -> dict[str, ParamSpec]:
    """The parameters that a model has on a single device, by path: no padding, no replicas.

    Args:
        config: config of the model.
        dtype: type of its weights.
    """
    model = abstract_model(config, sizes=dict.fromkeys(AXES, 1), dtype=dtype)
    return {spec.path: spec for spec in param_specs(model)}
