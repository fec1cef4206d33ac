"""GPUs that are not there: abstract devices that XLA compiles for, down to machine code.

The compiler comes with two wheels, ``jax-cuda13-plugin`` and ``jax-cuda13-pjrt`` of jax's own version, and ptxas with
``nvidia-cuda-nvcc``. No driver and no GPU is needed; run it with ``JAX_PLATFORMS=cpu``.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chip:
    """What XLA asks of a GPU before it compiles for it; from NVIDIA's data sheets and CUDA's device properties."""

    description: str
    compute_capability: tuple[int, int]
    # Instructions that only this generation has, such as Hopper's wgmma.
    accelerated_features: bool
    core_count: int
    clock_rate_ghz: float
    memory_bandwidth: int
    device_memory_size: int
    l2_cache_size: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int


_HOPPER: dict[str, Any] = {
    "compute_capability": (9, 0),
    "accelerated_features": True,
    "core_count": 132,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 50 * 2**20,
    "shared_memory_per_core": 228 * 2**10,
    "shared_memory_per_block_optin": 227 * 2**10,
}
CHIPS = {
    "h100": _Chip(
        description="NVIDIA H100 80GB HBM3",
        memory_bandwidth=3_352_320_000_000,
        device_memory_size=84_978_434_048,
        **_HOPPER,
    ),
    "h200": _Chip(
        description="NVIDIA H200",
        memory_bandwidth=4_814_000_000_000,
        device_memory_size=150_110_011_392,
        **_HOPPER,
    ),
    # Of the 192 GB and 8 TB/s of its data sheet, what CUDA says there is.
    "b200": _Chip(
        description="NVIDIA B200",
        compute_capability=(10, 0),
        accelerated_features=True,
        core_count=148,
        clock_rate_ghz=1.965,
        memory_bandwidth=7_672_320_000_000,
        device_memory_size=191_514_411_008,
        l2_cache_size=132_644_864,
        shared_memory_per_core=228 * 2**10,
        shared_memory_per_block_optin=227 * 2**10,
    ),
    "a100": _Chip(
        description="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        accelerated_features=False,
        core_count=108,
        clock_rate_ghz=1.41,
        memory_bandwidth=2_039_000_000_000,
        device_memory_size=85_049_999_360,
        l2_cache_size=40 * 2**20,
        shared_memory_per_core=164 * 2**10,
        shared_memory_per_block_optin=163 * 2**10,
    ),
}


@functools.cache
def gpu_topology(chip: str, count: int, *, hosts: int = 1) -> tuple[jax.Device, ...]:
    """Abstract GPUs to make a mesh of and compile for.

    ``jax.jit(f).lower(...).compile()`` with arguments sharded over such a mesh runs XLA's whole GPU pipeline;
    nothing can be run or allocated on them.

    Args:
        chip: "h100", "h200", "b200" or "a100".
        count: GPUs in all.
        hosts: machines that they are on, equally many on each.

    Returns:
        The devices, those of one host after those of the other.

    Raises:
        ValueError: the chip is unknown, or the GPUs do not split evenly over the hosts.
        NotImplementedError: the compiler is not installed.

    Example:
        >>> mesh = jaxmoe.make_mesh(tp=2, ep=4, devices=list(gpu_topology("h100", 8)))  # doctest: +SKIP
    """
    if chip not in CHIPS:
        raise ValueError(f"GPUs to compile for are {', '.join(CHIPS)}; got {chip!r}")
    if hosts < 1 or count < 1 or count % hosts:
        raise ValueError(f"hosts have equally many GPUs: {count} GPUs do not split over {hosts} hosts")
    _check_compiler()
    from jax.experimental import topologies

    description = topologies.get_topology_desc(
        platform="cuda", topology=f"1x{hosts}x{count // hosts}", target_config=_target_config(CHIPS[chip])
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


def _target_config(chip: _Chip) -> str:
    """The chip as XLA's GpuTargetConfigProto in text form."""
    major, minor = chip.compute_capability
    features = "feature_extension: ACCELERATED_FEATURES" if chip.accelerated_features else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {chip.shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {chip.core_count}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {chip.memory_bandwidth}
  l2_cache_size: {chip.l2_cache_size}
  clock_rate_ghz: {chip.clock_rate_ghz}
  device_memory_size: {chip.device_memory_size}
  shared_memory_per_block_optin: {chip.shared_memory_per_block_optin}
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{chip.description}"
"""
