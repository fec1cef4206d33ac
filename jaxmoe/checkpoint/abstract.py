"""The parameters of a model that is not made: no device is asked for and no backend starts."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from jaxmoe.config import DecoderConfig
from jaxmoe.layers import ParamSpec, param_specs
from jaxmoe.mesh import AXES
from jaxmoe.models import Decoder


def abstract_specs(config: DecoderConfig, dtype: Any = jnp.float32) -> dict[str, ParamSpec]:
    """The parameters that a model has on a single device, by path: no padding, no replicas.

    Args:
        config: the model's.
        dtype: of its weights.
    """
    mesh: Any = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    specs: dict[str, ParamSpec] = {}

    def build() -> None:
        specs.update({spec.path: spec for spec in param_specs(Decoder(config, mesh=mesh, dtype=dtype))})

    # Traced, because a layer puts its placement tables on its devices, and here there are none.
    jax.eval_shape(build)
    return specs
