"""Meshes over the simulated devices."""

import math

import jax
from jax.sharding import Mesh

from jaxmoe import make_mesh


def mesh_id(shape) -> str:
    return "dp{}-tp{}-ep{}".format(*shape) if isinstance(shape, tuple) else str(shape)


MESH_SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]


def mesh_of(dp: int, tp: int, ep: int) -> Mesh:
    """A mesh over as many of the simulated devices as it needs."""
    return make_mesh(dp, tp, ep, devices=jax.devices()[: math.prod((dp, tp, ep))])
