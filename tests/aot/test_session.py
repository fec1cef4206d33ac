"""The trivial kernels of a session on a GPU, built for one that is not here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxmoe
from jaxmoe.planning.topology import gpu_topology
from scripts._session.contact import add_one


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("kernel", "target"), [("mosaic_gpu", "mosaic_gpu"), ("triton", "__gpu$xla.gpu.triton")])
def test_a_trivial_kernel_of_each_kind(kernel, target, gpu_compiler) -> None:
    if kernel == "mosaic_gpu" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("the kernel needs jax 0.11.2")
    mesh = jaxmoe.make_mesh(devices=list(gpu_topology("h100", 1)))
    numbers = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = add_one(kernel).trace(numbers).lower(lowering_platforms=("cuda",)).compile()
    assert f'custom_call_target="{target}' in compiled.as_text()
