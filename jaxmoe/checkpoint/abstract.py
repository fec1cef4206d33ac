"""A model that is not made: no device is asked for, nothing is allocated and no backend starts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxmoe.config import DecoderConfig
from jaxmoe.layers import ParamSpec, param_specs
from jaxmoe.mesh import AXES, EP
from jaxmoe.models import Decoder
from jaxmoe.placement import ExpertPlacement

T = TypeVar("T")


def with_abstract_model(
    config: DecoderConfig,
    look: Callable[[Decoder], T],
    *,
    sizes: Mapping[str, int],
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
    expert_axes: tuple[str, ...] = (EP,),
    dtype: Any = jnp.float32,
) -> T:
    """What `look` finds in the model that this config, mesh and placement would give.

    Args:
        config: the model's.
        look: given the model, whose parameters have shapes and shardings and no values.
        sizes: of the mesh axes, as {"dp": 1, "tp": 2, "ep": 4}.
        placement, expert_axes, dtype: as for `jaxmoe.load`.

    Raises:
        ValueError: they do not fit together.
    """
    mesh: Any = AbstractMesh(tuple([sizes[axis] for axis in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    found: list[T] = []

    def build() -> None:
        found.append(look(Decoder(config, mesh=mesh, placement=placement, expert_axes=expert_axes, dtype=dtype)))

    # Traced, because a layer puts its placement tables on its devices, and here there are none.
    jax.eval_shape(build)
    return found[0]


def abstract_specs(config: DecoderConfig, dtype: Any = jnp.float32) -> dict[str, ParamSpec]:
    """The parameters that a model has on a single device, by path: no padding, no replicas.

    Args:
        config: the model's.
        dtype: of its weights.
    """

    def specs(model: Decoder) -> dict[str, ParamSpec]:
        return {spec.path: spec for spec in param_specs(model)}

    return with_abstract_model(config, specs, sizes=dict.fromkeys(AXES, 1), dtype=dtype)
