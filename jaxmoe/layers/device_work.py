"""The work of a model for its kernels: the products of its experts, and those with packed matrices."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxmoe.kernels.grouped_matmul import Work
from jaxmoe.layers.moe import MoE
from jaxmoe.layers.weights import WeightSpecs, local_matrices


def kernel_work(model: nnx.Module, dtype: DTypeLike) -> dict[str, Work]:
    """Name all work of one device, of a model that has values or has none.

    Args:
        model: model, or a layer.
        dtype: dtype of the activations.

    Returns:
        Work by the path of the layer with experts, or of the packed matrix.
    """
    found: dict[str, Work] = {}
    for steps, owner in nnx.iter_modules(model):
        if isinstance(owner, MoE):
            found[_path(steps)] = owner._kernel_work(dtype)
        for specs in [value for value in vars(owner).values() if isinstance(value, WeightSpecs)]:
            for name, _ in specs.packings:
                if not isinstance(owner, MoE) or name not in ("w_gate_up", "w_down"):
                    mesh: Mesh = vars(owner)["mesh"]
                    sizes = dict(mesh.shape)
                    matrix, activations = local_matrices(specs.value(owner, name), specs.spec(owner, name), sizes)
                    one = jax.tree.map(lambda array: jax.ShapeDtypeStruct((1, *array.shape), array.dtype), matrix)
                    found[_path((*steps, name))] = Work.product(dtype, one, activations)
    return found


def _path(steps: tuple[Any, ...]) -> str:
    return ".".join(map(str, steps))
