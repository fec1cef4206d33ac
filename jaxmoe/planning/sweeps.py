"""`sweep`: memory and decode time of one mesh over numbers of sequences and their lengths."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checks import flag, integer
from jaxmoe.hardware import get_gpu
from jaxmoe.mesh import EP
from jaxmoe.placement import RoutingTrace
from jaxmoe.planning.measured import read_measured
from jaxmoe.planning.memory import checked_dtype, checked_length, checked_prompt, step_parts, weight_parts
from jaxmoe.planning.planned import PlannedCheckpoint, keeps_packed
from jaxmoe.planning.roofline import StepTime, TimeModel
from jaxmoe.planning.routing import AnyPlacement, checked_halves, resolve_placement
from jaxmoe.planning.workspace import StepMemory


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """Memory and time of one number of sequences of one length.

    Attributes:
        batch_size: number of sequences.
        length: tokens of each.
        bytes_per_device: bytes of weights, cache and what a step needs besides, on the fullest device, see `Plan`.
        fits: whether a device has room for them.
        decode: modeled time of a step that adds a token to each.
    """

    batch_size: int
    length: int
    bytes_per_device: int
    fits: bool
    decode: StepTime

    def to_dict(self) -> dict[str, Any]:
        """The point as plain types, for JSON."""
        times = {"seconds": self.decode.seconds, "tokens_per_second": self.decode.tokens_per_second}
        return dataclasses.asdict(self) | times


def sweep(
    path: str | Path,
    *,
    device: str,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    prompt_length: int | None = None,
    dp: int = 1,
    tp: int = 1,
    ep: int = 1,
    placement: AnyPlacement = "linear",
    expert_axes: tuple[str, ...] = (EP,),
    devices_per_node: int = 8,
    dtype: str | None = None,
    quantized: str = "keep",
    mtp: bool = False,
    trace: RoutingTrace | None = None,
    measured: str | Path | Sequence[str | Path] | None = None,
) -> list[SweepPoint]:
    """Plan a model for every number of sequences with every length.

    Args:
        path: checkpoint, given as for `jaxmoe.plan`.
        device: kind of every device, a name in `jaxmoe.hardware.GPUS`.
        batch_sizes: numbers of sequences.
        lengths: tokens of each.
        prompt_length: tokens of each in the prefill; None for half of each length.
        dp, tp, ep, placement, expert_axes, dtype, quantized, mtp: arguments of `jaxmoe.plan`.
        devices_per_node: devices that the faster links join.
        trace: routing trace in place of even routing, as for `search_meshes`.
        measured: files whose measured rates and times are taken in place of modeled ones, see `read_measured`.

    Returns:
        A point for each pair, lengths of one number of sequences together.

    Raises:
        FileNotFoundError: there is no config.json, or no such file of measurements.
        ValueError: a size or name does not fit, a file has no measurements of the device, or the checkpoint cannot be
            loaded.

    Example:
        >>> points = sweep("docs/configs/Qwen3-30B-A3B", ep=8, device="h100", batch_sizes=[1, 512], lengths=[32768])
        >>> [point.fits for point in points]
        [True, False]
    """
    gpu = get_gpu(device)
    found, checkpoint = read_measured(measured, gpu), PlannedCheckpoint.read(path, mtp=flag("mtp", mtp))
    batch_sizes = [integer("batch_size", size, least=1) for size in batch_sizes]
    lengths = [checked_length(checkpoint.config, length) for length in lengths]
    sizes = {name: integer(name, size, least=1) for name, size in {"dp": dp, "tp": tp, "ep": ep}.items()}
    past, future = checked_halves(checkpoint.config, trace)
    model = checkpoint.model(
        sizes=sizes,
        placement=resolve_placement(checkpoint.config, placement, sizes, expert_axes, past=past),
        expert_axes=expert_axes,
        dtype=checked_dtype(checkpoint.config, dtype),
        keep=keeps_packed(quantized),
    )
    weights, memory, points = np.sum(list(weight_parts(model).values()), axis=0), StepMemory(model), []
    times = TimeModel(model, gpu=gpu, devices_per_node=devices_per_node, trace=future, measured=found)
    for batch_size in batch_sizes:
        for length in lengths:
            beside = step_parts(model, memory, batch_size, checked_prompt(prompt_length, length), length)
            held = int(np.sum([weights, *beside.values()], axis=0).max())
            points.append(
                SweepPoint(
                    batch_size=batch_size,
                    length=length,
                    bytes_per_device=held,
                    fits=held <= gpu.memory,
                    decode=times("decode", batch_size=batch_size, length=length),
                )
            )
    return points
