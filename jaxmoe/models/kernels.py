"""The kernels of a model: found out where they are left to "auto", and told."""

from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxmoe.kernels.grouped_matmul import choose_backend, hold_trials
from jaxmoe.layers import kernel_work


def try_kernels(model: nnx.Module, mesh: Mesh, dtype: DTypeLike, kernels: str) -> None:
    """Find out which kernels give right results for a model on its GPUs, where the choice is "auto".

    All processes call it alike.

    Args:
        model: model, with values or without.
        mesh: mesh that it is on.
        dtype: dtype of the activations.
        kernels: name of a backend that was asked for, or "auto".
    """
    if kernels == "auto":
        hold_trials(mesh, kernel_work(model, dtype).values())


def describe_kernels(model: nnx.Module, mesh: Mesh, dtype: DTypeLike, kernels: str) -> list[str]:
    """Say which kernels multiply what, and why, in a line each; arguments as of `try_kernels`."""
    work = kernel_work(model, dtype)
    if kernels != "auto" or not work:
        return [f"kernels: {kernels}, as it was asked for"] if work else []
    kind = mesh.devices.flat[0].device_kind
    parts: dict[tuple[str, str], set[str]] = {}
    for path, each in work.items():
        choice = choose_backend(each, kind)
        part = "experts" if path.rpartition(".")[2] == "moe" else "packed dense layers"
        parts.setdefault(choice, set()).add(part)
    return [f"kernels: {name} for {' and '.join(sorted(of))} ({why})" for (name, why), of in parts.items()]
