"""Facts about devices that need not be there: memory, arithmetic and links, each stated once with its source."""

import dataclasses
import re
from typing import Any, TypeVar

import numpy as np

from jaxmoe.checks import real_number

_Amount = TypeVar("_Amount", float, np.ndarray)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Links:
    """The ways from a device to others, and the time that messages take on them.

    Attributes:
        within: bytes per second that a device sends, or receives, within its node.
        between: bytes per second that it sends, or receives, between nodes.
        latency: seconds of a message of no bytes, on either way.

    Raises:
        ValueError: a speed is not finite and above 0, or the latency not finite and at least 0.

    Example:
        >>> Links(within=4, between=2, latency=1).seconds(8, 8, messages=3)
        9.0
    """

    within: float
    between: float
    latency: float

    def __post_init__(self) -> None:
        real_number("within", self.within, above=0)
        real_number("between", self.between, above=0)
        real_number("latency", self.latency, least=0)

    def seconds(self, within: _Amount, between: _Amount | float = 0.0, *, messages: int = 1) -> _Amount:
        """Model the time of messages: messages · latency + within / speed within + between / speed between.

        The two ways follow each other, and nothing else is on them.

        Args:
            within: bytes sent, or received, within the node, by all messages together: a number, or an array of any shape.
            between: bytes sent, or received, between nodes, of the same shape.
            messages: number of times that the latency is waited for.

        Returns:
            Seconds, of the shape of `within`.
        """
        return messages * self.latency + (within / self.within + between / self.between)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of device as the models of time see it.

    Attributes:
        name: name that its maker, or JAX, gives it.
        memory_bandwidth: bytes per second that it reads or writes of its own memory.
        links: ways from it to other devices.

    Raises:
        ValueError: the bandwidth is not finite and above 0.
    """

    name: str
    memory_bandwidth: float
    links: Links

    def __post_init__(self) -> None:
        real_number("memory_bandwidth", self.memory_bandwidth, above=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPU(Device):
    """A kind of NVIDIA GPU.

    Memory, its bandwidth, multiprocessors, cache and clock are CUDA's device properties, as XLA has published most of them
    in xla/backends/gpu/target_config/specs: they are what a program gets. A data sheet's GB of memory are of 2**30 bytes,
    before error correction and the driver take their part. The bandwidth is that of the pins, clock times width. Limits of a
    multiprocessor follow from the compute capability, by the table of technical specifications in NVIDIA's CUDA C++
    Programming Guide. Arithmetic and links are by NVIDIA's data sheets.

    Attributes:
        memory: bytes of its memory that CUDA reports; the CUDA context takes some hundred MB of them.
        flops: additions and multiplications of bfloat16 numbers per second, of dense matrices.
        compute_capability: major and minor number, as CUDA has them.
        multiprocessors: number of its multiprocessors (SMs).
        fp32_units: float32 units of a multiprocessor.
        threads: most threads that a multiprocessor holds.
        shared_memory: bytes of shared memory of a multiprocessor.
        block_shared_memory: bytes of it that one block may have.
        l2_cache: bytes of the second level of cache.
        clock_ghz: highest clock of the multiprocessors, in GHz.

    Raises:
        ValueError: the bandwidth or `flops` are not finite and above 0.
    """

    memory: int
    flops: float
    compute_capability: tuple[int, int]
    multiprocessors: int
    fp32_units: int = 128
    threads: int = 2048
    shared_memory: int
    block_shared_memory: int
    l2_cache: int
    clock_ghz: float

    def __post_init__(self) -> None:
        super().__post_init__()
        real_number("flops", self.flops, above=0)


# A small collective of NCCL over NVLink, in round numbers; nothing of it has been measured here.
_LATENCY = 10e-6
# By compute capability, see `GPU`.
_AMPERE: dict[str, Any] = {
    "compute_capability": (8, 0),
    "fp32_units": 64,
    "shared_memory": 164 * 2**10,
    "block_shared_memory": 163 * 2**10,
}
_ADA: dict[str, Any] = {
    "compute_capability": (8, 9),
    "threads": 1536,
    "shared_memory": 100 * 2**10,
    "block_shared_memory": 99 * 2**10,
}
_HOPPER: dict[str, Any] = {
    "compute_capability": (9, 0),
    "shared_memory": 228 * 2**10,
    "block_shared_memory": 227 * 2**10,
}
_BLACKWELL: dict[str, Any] = {
    "compute_capability": (10, 0),
    "shared_memory": 228 * 2**10,
    "block_shared_memory": 227 * 2**10,
}
# NVLink of the third, fourth and fifth generation by NVIDIA's data sheets: half of their 600, 900 and 1800 GB/s, which are
# of both directions. Between nodes a network card a GPU, of 200 Gb/s in DGX A100 and of 400 Gb/s in DGX H100, H200 and B200.
_NVLINK_3 = Links(within=300e9, between=25e9, latency=_LATENCY)
_NVLINK_4 = Links(within=450e9, between=50e9, latency=_LATENCY)
_NVLINK_5 = Links(within=900e9, between=50e9, latency=_LATENCY)
# PCIe 4.0 x16 by L40S's data sheet, half of the 64 GB/s of both directions; 200 Gb/s a GPU in NVIDIA's reference designs.
_PCIE_4 = Links(within=32e9, between=25e9, latency=_LATENCY)
# PCIe 5.0 x16 by H100 PCIe's data sheet, half of the 128 GB/s of both directions: its bridges join no more than two cards.
_PCIE_5 = Links(within=64e9, between=50e9, latency=_LATENCY)

# https://docs.jax.dev/en/latest/201/gpu-memory.html
JAX_TAKES = 0.75
"""Part of a GPU's memory that JAX takes for its arrays where XLA_CLIENT_MEM_FRACTION says nothing."""

# Words in a device's name that tell no two of these apart. A card for PCIe is another one, and so is an NVL.
_SAID_BESIDE = r"nvidia|tensor|core|gpu|sxm\d?|hbm\d?e?|gddr\d"
_MEMORY_TOLERANCE = 0.09

GPUS = {
    # XLA's a100_sxm_40.txtpb; data sheet: 40 GB, 1,555 GB/s, 312 TFLOP/s.
    "a100-40gb": GPU(
        name="NVIDIA A100-SXM4-40GB",
        memory=42_331_013_120,
        memory_bandwidth=1_555_200_000_000,
        flops=312e12,
        multiprocessors=108,
        l2_cache=40 * 2**20,
        clock_ghz=1.41,
        links=_NVLINK_3,
        **_AMPERE,
    ),
    # XLA's a100_sxm_80.txtpb; data sheet: 80 GB, 2,039 GB/s, 312 TFLOP/s.
    "a100": GPU(
        name="NVIDIA A100-SXM4-80GB",
        memory=85_100_068_864,
        memory_bandwidth=2_039_040_000_000,
        flops=312e12,
        multiprocessors=108,
        l2_cache=40 * 2**20,
        clock_ghz=1.41,
        links=_NVLINK_3,
        **_AMPERE,
    ),
    # PyTorch prints 45589 MB of CUDA's; the rest from the data sheet (48 GB, 864 GB/s, 362 TFLOP/s without sparsity, 18,176
    # float32 units of 128 a multiprocessor) and from NVIDIA's white paper of the Ada architecture (cache, clock).
    "l40s": GPU(
        name="NVIDIA L40S",
        memory=45_589 * 2**20,
        memory_bandwidth=864_000_000_000,
        flops=362e12,
        multiprocessors=142,
        l2_cache=96 * 2**20,
        clock_ghz=2.52,
        links=_PCIE_4,
        **_ADA,
    ),
    # XLA's h100_sxm.txtpb, with the memory of its older versions; data sheet: 80 GB, 3.35 TB/s, 989 TFLOP/s.
    "h100": GPU(
        name="NVIDIA H100 80GB HBM3",
        memory=84_978_434_048,
        memory_bandwidth=3_352_320_000_000,
        flops=989e12,
        multiprocessors=132,
        l2_cache=50 * 2**20,
        clock_ghz=1.98,
        links=_NVLINK_4,
        **_HOPPER,
    ),
    # XLA's h100_pcie.txtpb; data sheet: 80 GB, 2 TB/s, 756 TFLOP/s without sparsity.
    "h100-pcie": GPU(
        name="NVIDIA H100 PCIe",
        memory=84_942_979_072,
        memory_bandwidth=2_039_040_000_000,
        flops=756e12,
        multiprocessors=114,
        l2_cache=50 * 2**20,
        clock_ghz=1.755,
        links=_PCIE_5,
        **_HOPPER,
    ),
    # CUDA reports 95.1 GiB, 78 multiprocessors, 60 MiB of cache; data sheet: 96 GB, 4 TB/s, 148 TFLOP/s, an H100's NVLink.
    "h20": GPU(
        name="NVIDIA H20",
        memory=97_382 * 2**20,
        memory_bandwidth=4_000_000_000_000,
        flops=148e12,
        multiprocessors=78,
        l2_cache=60 * 2**20,
        clock_ghz=1.98,
        links=_NVLINK_4,
        **_HOPPER,
    ),
    # PyTorch prints 143156 MB of memory and 60 MB of cache, those of six stacks of HBM where an H100 has five; bandwidth is
    # that of 6016 pins at 3,201 MHz. XLA's h200.txtpb has the data sheet's (141 GB, 4.8 TB/s, 989 TFLOP/s) and an H100's.
    "h200": GPU(
        name="NVIDIA H200",
        memory=150_110_011_392,
        memory_bandwidth=4_814_304_000_000,
        flops=989e12,
        multiprocessors=132,
        l2_cache=60 * 2**20,
        clock_ghz=1.98,
        links=_NVLINK_4,
        **_HOPPER,
    ),
    # An H200 as a card for PCIe, up to four of them bridged by NVLink; data sheet: 141 GB, 4.8 TB/s, 835 TFLOP/s without
    # sparsity, and 60 TFLOP/s of float32, which is the clock of as many multiprocessors as an H200 has.
    "h200-nvl": GPU(
        name="NVIDIA H200 NVL",
        memory=150_110_011_392,
        memory_bandwidth=4_814_304_000_000,
        flops=835e12,
        multiprocessors=132,
        l2_cache=60 * 2**20,
        clock_ghz=1.785,
        links=_NVLINK_4,
        **_HOPPER,
    ),
    # XLA's b200.txtpb; data sheets: 180 to 192 GB, 7.7 to 8 TB/s, 2.25 PFLOP/s.
    "b200": GPU(
        name="NVIDIA B200",
        memory=191_514_411_008,
        memory_bandwidth=7_672_320_000_000,
        flops=2.25e15,
        multiprocessors=148,
        l2_cache=132_644_864,
        clock_ghz=1.965,
        links=_NVLINK_5,
        **_BLACKWELL,
    ),
}
# Simulated devices share one memory, and a collective is a rendezvous of threads; in round numbers.
SIMULATED_CPU = Device(
    name="simulated CPU device", memory_bandwidth=8e9, links=Links(within=8e9, between=8e9, latency=60e-6)
)


def get_gpu(name: str) -> GPU:
    """The kind of GPU of that name.

    Args:
        name: a key of `GPUS`, or a name as people and tools write it: in either case, with "NVIDIA", the memory, its kind
            and the socket (SXM) or without.

    Raises:
        ValueError: it is not known here, or its memory is that of another one.

    Example:
        >>> get_gpu("h100").multiprocessors, get_gpu("NVIDIA H100 80GB HBM3") == get_gpu("H100-80GB") == get_gpu("h100")
        (132, True)
    """
    model, sizes = _model_and_sizes(name if isinstance(name, str) else "")
    if len(sizes) <= 1:
        if not sizes and model in GPUS:
            return GPUS[model]
        for gpu in [gpu for key, gpu in GPUS.items() if _model_and_sizes(key)[0] == model]:
            # A data sheet's GB are a little more than what CUDA reports.
            if sizes and abs(sizes[0] * 2**30 / gpu.memory - 1) < _MEMORY_TOLERANCE:
                return gpu
    raise ValueError(f"devices are {', '.join(GPUS)}, and these with their memory, as in H100-80GB; got {name!r}")


def _model_and_sizes(name: str) -> tuple[str, list[int]]:
    """The words that tell a model, joined by hyphens, and the sizes of memory in a name."""
    words = re.findall(r"\d+ *gi?b|[a-z0-9]+", name.lower())
    sizes = [int(word.rstrip(" gib")) for word in words if re.fullmatch(r"\d+ *gi?b", word)]
    return "-".join(word for word in words if not re.fullmatch(rf"{_SAID_BESIDE}|\d+ *gi?b", word)), sizes
