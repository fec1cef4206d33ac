"""GPUs that are not there: abstract devices that XLA compiles for, down to machine code.

The compiler comes with two wheels, ``jax-cuda13-plugin`` and ``jax-cuda13-pjrt`` of jax's own version, and ptxas with
``nvidia-cuda-nvcc``. No driver and no GPU is needed; run it with ``JAX_PLATFORMS=cpu``.
"""

import functools
import importlib.metadata
import importlib.util

import jax

from jaxmoe.hardware import GPU, get_gpu


@functools.cache
def gpu_topology(chip: str, count: int, *, hosts: int = 1) -> tuple[jax.Device, ...]:
    """Abstract GPUs to make a mesh of and compile for.

    ``jax.jit(f).lower(...).compile()`` with arguments sharded over such a mesh runs XLA's whole GPU pipeline;
    nothing can be run or allocated on them.

    Args:
        chip: name in `jaxmoe.hardware.GPUS`, such as "h100".
        count: number of GPUs in all.
        hosts: number of machines that they are on, equally many on each.

    Returns:
        The devices, those of one host after those of the other.

    Raises:
        ValueError: the chip is unknown, or the GPUs do not split evenly over the hosts.
        NotImplementedError: the compiler is not installed.

    Example:
        >>> mesh = jaxmoe.make_mesh(tp=2, ep=4, devices=list(jaxmoe.gpu_topology("h100", 8)))
    """
    gpu = get_gpu(chip)
    if hosts < 1 or count < 1 or count % hosts:
        raise ValueError(f"hosts have equally many GPUs: {count} GPUs do not split over {hosts} hosts")
    _check_compiler()
    from jax.experimental import topologies

    description = topologies.get_topology_desc(
        platform="cuda", topology=f"1x{hosts}x{count // hosts}", target_config=_target_config(gpu)
    )
    return tuple(description.devices)


def _check_compiler() -> None:
    version = importlib.metadata.version("jax")
    for wheel, module in (("jax-cuda13-plugin", "jax_cuda13_plugin"), ("jax-cuda13-pjrt", "jax_plugins.xla_cuda13")):
        if importlib.util.find_spec(module) is None or importlib.metadata.version(wheel) != version:
            raise NotImplementedError(
                f"compiling for a GPU needs jax's compiler: pip install jax-cuda13-plugin=={version} "
                f"jax-cuda13-pjrt=={version} nvidia-cuda-nvcc; {wheel} is not here in that version"
            )


def _target_config(gpu: GPU) -> str:
    """The GPU as XLA's GpuTargetConfigProto in text form."""
    major, minor = gpu.compute_capability
    # Since Hopper there are instructions that only one generation has, such as its wgmma.
    features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.fp32_units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}
  shared_memory_per_block_optin: {gpu.block_shared_memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{gpu.name}"
"""
