"""The jobs of a session in their order, each with its seconds, kernels and environment. Imports no jax."""

import dataclasses
import sys
from collections.abc import Mapping

FUSION = {"XLA_FLAGS": "--xla_gpu_experimental_use_ragged_dot_fusion=true"}
# jax and torch share the memory, and a job that died must leave none taken.
BY_NEED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# 48 layers of Qwen3-30B-A3B fill 61 of 80 GB, more than jax takes by itself.
NEARLY_ALL = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}


@dataclasses.dataclass(frozen=True)
class Job:
    """A process of a session.

    Attributes:
        name: name in results, and in messages about jobs that are left out.
        seconds: time limit.
        command: program with its arguments; the kernel is added as the last one.
        kernels: kernels that can do the job, best first; the first that nothing is known against is taken. A name such as
            "triton.packed" is a part of "triton": it can be lost alone, and is lost with it, so that one strange variant or
            one bad candidate of tuning does not cost the times of a layer. Empty where no kernel matters.
        environment: variables for the process.
        needed: flag that the session ends where this job fails.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    kernels: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: BY_NEED)
    needed: bool = False


def _job(
    name: str,
    seconds: float,
    function: str,
    *kernels: str,
    environment: Mapping[str, str] = BY_NEED,
    needed: bool = False,
) -> Job:
    return Job(name, seconds, (sys.executable, "-m", "scripts._session.jobs", function), kernels, environment, needed)


# A product of a few numbers by XLA: whether the GPU still works after a job that failed.
ALIVE = _job("the GPU still works", 30, "alive")

GPU_KERNELS = ("mosaic_gpu", "triton")


def gpu_jobs(gpus: int = 1) -> list[Job]:
    """The jobs for so many GPUs; those of one take 535 seconds, if each takes all of its own, and several 100 more."""
    return [
        _job("machine", 30, "machine", needed=True),
        *(_job(f"trivial kernel, {kernel}", 10, "trivial_kernel", f"{kernel}.trivial") for kernel in GPU_KERNELS),
        _job("first light, mosaic_gpu", 35, "first_light", "mosaic_gpu"),
        _job("first light, triton", 20, "first_light", "triton"),
        _job("variants, mosaic_gpu", 20, "plain_variants", "mosaic_gpu.variants"),
        _job("variants, mosaic_gpu, packed", 20, "packed_variants", "mosaic_gpu.packed"),
        _job("variants, triton", 20, "plain_variants", "triton.variants"),
        _job("ceilings", 12, "ceilings"),
        _job("expert MLPs, mosaic_gpu", 18, "expert_mlps", "mosaic_gpu"),
        _job("expert MLPs, torch", 16, "expert_mlps", "torch_grouped_mm"),
        _job("expert MLPs, triton", 16, "expert_mlps", "triton"),
        _job("expert MLPs, XLA fused", 16, "expert_mlps", "xla_ragged_dot.fused", environment=BY_NEED | FUSION),
        _job("expert MLPs, XLA", 12, "few_rows", "xla_ragged_dot"),
        _job("tuning, mosaic_gpu", 75, "tuning", "mosaic_gpu.tuning"),
        _job("tuning, triton", 40, "tuning", "triton.tuning"),
        _job("headline, tuned", 20, "headline", *GPU_KERNELS),
        _job("skewed routings", 15, "skewed", *GPU_KERNELS),
        *several_gpus(gpus, 40, 60, *GPU_KERNELS, "portable"),
        _job("layer", 40, "layer", *GPU_KERNELS, "portable"),
        _job("model, 4 layers", 35, "model_4", *GPU_KERNELS, "portable", environment=NEARLY_ALL),
        _job("model, 48 layers", 55, "model_48", *GPU_KERNELS, "portable", environment=NEARLY_ALL),
    ]


def several_gpus(gpus: int, exchange: float, dispatches: float, *kernels: str) -> list[Job]:
    """The jobs that only several GPUs can do, with their seconds; none for one."""
    if gpus == 1:
        return []
    return [
        _job(f"exchange, {gpus} devices", exchange, "exchange"),
        _job(f"dispatch, {gpus} devices", dispatches, "dispatches", *(f"{kernel}.dispatch" for kernel in kernels)),
    ]


def tiny_jobs(gpus: int = 1) -> list[Job]:
    """The same functions with tiny sizes on a CPU, by the kernels that run there."""
    functions = [
        ("machine", "machine", ()),
        ("variants, portable", "plain_variants", ("portable",)),
        ("variants, portable, packed", "packed_variants", ("portable.packed",)),
        ("first light, portable", "first_light", ("portable",)),
        ("ceilings", "ceilings", ()),
        ("expert MLPs, portable", "expert_mlps", ("portable",)),
        ("expert MLPs, torch", "expert_mlps", ("torch_grouped_mm",)),
        ("expert MLPs, XLA", "few_rows", ("xla_ragged_dot",)),
        ("tuning, mosaic_gpu", "tuning", ("mosaic_gpu",)),
        ("headline, tuned", "headline", ("portable",)),
        ("skewed routings", "skewed", ("portable",)),
        ("layer", "layer", ("portable",)),
        ("model, 4 layers", "model_4", ("portable",)),
    ]
    jobs = [_job(name, 240, function, *kernels, needed=name == "machine") for name, function, kernels in functions]
    return [*jobs, *several_gpus(gpus, 240, 240, "portable")]
