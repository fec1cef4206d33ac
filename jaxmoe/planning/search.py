"""`search_meshes`: every mesh of so many devices that a model can lie on, the best one first."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checks import flag, integer
from jaxmoe.dispatch import DISPATCHES
from jaxmoe.hardware import get_gpu
from jaxmoe.mesh import AXES, DP, EP, TP, write_mesh
from jaxmoe.placement import RoutingTrace
from jaxmoe.planning.measured import read_measured
from jaxmoe.planning.memory import checked_dtype, checked_length, checked_prompt, step_parts, weight_parts
from jaxmoe.planning.planned import PlannedCheckpoint, keeps_packed
from jaxmoe.planning.roofline import Phase, StepTime, TimeModel
from jaxmoe.planning.routing import checked_halves, resolve_placement
from jaxmoe.planning.workspace import StepMemory


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshChoice:
    """One way to lay a model out, with its memory and its modeled times.

    Attributes:
        mesh: sizes of the mesh, {"dp": ..., "tp": ..., "ep": ...}.
        expert_axes: mesh axes that share the experts.
        bytes_per_device: bytes of weights, cache and what a step needs besides, on the fullest device, see `Plan`.
        decode: modeled time of a decode step.
        prefill: modeled time of the prefill.
    """

    mesh: dict[str, int]
    expert_axes: tuple[str, ...]
    bytes_per_device: int
    decode: StepTime
    prefill: StepTime

    def __str__(self) -> str:
        return describe_layout(self.mesh, self.expert_axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSearch:
    """The meshes of so many devices, by modeled time.

    Attributes:
        device: kind of every device.
        capacity: bytes of its memory.
        batch_size: sequences.
        max_length: tokens of each that the cache is for, all of which a decode step reads.
        prompt_length: tokens of each in the prefill.
        rank_by: step whose time decides.
        choices: layouts that fit, the fastest first.
        too_large: layouts that do not fit, the one that lacks least first.
        left_out: {mesh: reason why the model cannot lie on it}.
        measured: lines about the files whose measurements were taken.
    """

    device: str
    capacity: int
    batch_size: int
    max_length: int
    prompt_length: int
    rank_by: Phase
    choices: tuple[MeshChoice, ...]
    too_large: tuple[MeshChoice, ...]
    left_out: dict[str, str]
    measured: tuple[str, ...] = ()

    def explain(self) -> tuple[str, ...]:
        """Tell why the first is the first, in three lines and one for each file of measurements; or that none fits."""
        if not self.choices:
            if not self.too_large:
                return ("the model lies on none of these meshes: " + "; ".join(dict.fromkeys(self.left_out.values())),)
            least = self.too_large[0]
            return (
                f"nothing fits in the {self.capacity / 1e9:.1f} GB of a {self.device}; {least} needs least, "
                f"{least.bytes_per_device / 1e9:.1f} GB on a device",
            )
        best = self.choices[0]
        step: StepTime = getattr(best, self.rank_by)
        parts = ", ".join(
            f"{name} {seconds / step.seconds:.0%}{f' ({step.sources[name]})' if self.measured else ''}"
            for name, seconds in step.terms().items()
            if seconds
        )
        lines = [
            f"{best}: a {self.rank_by} step at batch size {self.batch_size} takes {step.seconds * 1e3:.2f} ms by the model, "
            f"{step.tokens_per_second:,.0f} tokens/s; each device holds {best.bytes_per_device / 1e9:.1f} of "
            f"{self.capacity / 1e9:.1f} GB",
            f"its time is {parts}",
        ]
        if len(self.choices) > 1:
            other = self.choices[1]
            theirs: StepTime = getattr(other, self.rank_by)
            part = max(step.terms(), key=lambda name: theirs.terms()[name] - step.terms()[name])
            more = theirs.terms()[part] - step.terms()[part]
            longer = "as long by the model"
            if (times := f"{theirs.seconds / step.seconds:.2f}") != "1.00":
                takes = "takes" if part in ("cache", "exchange") else "take"
                longer = f"{times} times as long: its {part} {takes} {more * 1e3:.2f} ms more"
            lines.append(f"the next, {other}, takes {longer}")
        return (*lines, *self.measured)

    def to_dict(self) -> dict[str, Any]:
        """The search as plain types, for JSON."""
        return dataclasses.asdict(self) | {"explanation": list(self.explain())}


def search_meshes(
    path: str | Path,
    devices: int,
    *,
    device: str,
    batch_size: int = 64,
    max_length: int | None = None,
    prompt_length: int | None = None,
    devices_per_node: int = 8,
    placement: str = "linear",
    dispatch: str = "auto",
    dtype: str | None = None,
    quantized: str = "keep",
    mtp: bool = False,
    rank_by: Phase = "decode",
    skew: float | None = None,
    trace: RoutingTrace | None = None,
    measured: str | Path | Sequence[str | Path] | None = None,
) -> MeshSearch:
    """Try every (dp, tp, ep) and way of sharing the experts, drop what does not fit, and rank the rest by modeled time.

    Args:
        path: checkpoint, given as for `jaxmoe.plan`.
        devices: number of devices.
        device: their kind, a name in `jaxmoe.hardware.GPUS`.
        batch_size: sequences.
        max_length: tokens of each that the cache is for; None as for `jaxmoe.plan`. A decode step reads all of it.
        prompt_length: tokens of each in the prefill; None for half of `max_length`.
        devices_per_node: devices that the faster links join.
        placement: strategy's name.
        dispatch: backend of `jaxmoe.dispatch`, or "auto" for what the layer would take.
        dtype, quantized, mtp: arguments of `jaxmoe.plan`.
        rank_by: step whose time decides, "decode" or "prefill".
        skew: rows of the device with the most of them over the mean; None for even routing, or that of `trace`.
        trace: routing trace, whose second half tells the load of every slot, and whose first half strategies place by.
        measured: files whose measured rates and times are taken in place of modeled ones, see `read_measured`.

    Raises:
        FileNotFoundError: there is no config.json, or no such file of measurements.
        ValueError: a size or name does not fit, or the checkpoint cannot be loaded.

    Example:
        >>> found = search_meshes("docs/configs/Qwen3-30B-A3B", 2, device="h100", batch_size=64)
        >>> found.choices[0].decode.seconds <= found.choices[-1].decode.seconds
        True
    """
    devices = integer("devices", devices, least=1)
    batch_size = integer("batch_size", batch_size, least=1)
    devices_per_node = integer("devices_per_node", devices_per_node, least=1)
    gpu = get_gpu(device)
    found = read_measured(measured, gpu)
    if rank_by not in ("decode", "prefill"):
        raise ValueError(f'rank_by is "decode" or "prefill"; got {rank_by!r}')
    if dispatch not in ("auto", *DISPATCHES):
        raise ValueError(f"dispatch backends are auto, {', '.join(DISPATCHES)}; got {dispatch!r}")
    keep = keeps_packed(quantized)
    checkpoint = PlannedCheckpoint.read(path, mtp=flag("mtp", mtp))
    past, future = checked_halves(checkpoint.config, trace, skew)
    max_length = checked_length(checkpoint.config, max_length)
    dtype = checked_dtype(checkpoint.config, dtype)
    prompt = checked_prompt(prompt_length, max_length)
    choices, left_out = [], {}
    for sizes, expert_axes in layouts(devices):
        try:
            placed = resolve_placement(checkpoint.config, placement, sizes, expert_axes, past=past)
            model = checkpoint.model(sizes=sizes, placement=placed, expert_axes=expert_axes, dtype=dtype, keep=keep)
        except CheckpointError:
            raise
        except ValueError as error:
            left_out[describe_layout(sizes, expert_axes)] = str(error)
            continue

        times = TimeModel(
            model,
            gpu=gpu,
            devices_per_node=devices_per_node,
            dispatch=dispatch,
            skew=skew,
            trace=future,
            measured=found,
        )
        beside = step_parts(model, StepMemory(model, dispatch), batch_size, prompt, max_length)
        held = np.sum([*weight_parts(model).values(), *beside.values()], axis=0)
        choices.append(
            MeshChoice(
                mesh=sizes,
                expert_axes=expert_axes,
                bytes_per_device=int(held.max()),
                decode=times("decode", batch_size=batch_size, length=max_length),
                prefill=times("prefill", batch_size=batch_size, length=prompt),
            )
        )
    fits = [choice for choice in choices if choice.bytes_per_device <= gpu.memory]
    return MeshSearch(
        device=device,
        capacity=gpu.memory,
        batch_size=batch_size,
        max_length=max_length,
        prompt_length=prompt,
        rank_by=rank_by,
        choices=tuple(sorted(fits, key=lambda choice: (getattr(choice, rank_by).seconds, choice.bytes_per_device))),
        too_large=tuple(
            sorted([choice for choice in choices if choice not in fits], key=lambda choice: choice.bytes_per_device)
        ),
        left_out=left_out,
        measured=found.describe(gpu),
    )


def layouts(devices: int) -> Iterator[tuple[dict[str, int], tuple[str, ...]]]:
    """Give every mesh of so many devices, with each way of sharing the experts that is another one there."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for dp, tp in itertools.product(sizes, repeat=2):
        if devices % (dp * tp):
            continue
        mesh = dict(zip(AXES, (dp, tp, devices // (dp * tp)), strict=True))
        yield mesh, (EP,)
        if tp > 1:
            yield mesh, (EP, TP)
        if dp > 1:
            yield mesh, (DP, EP)


def describe_layout(sizes: Mapping[str, int], expert_axes: tuple[str, ...]) -> str:
    """Write a mesh and the axes that share the experts as a line of text."""
    return f"{write_mesh(sizes)}, experts over {'·'.join(expert_axes)}"
