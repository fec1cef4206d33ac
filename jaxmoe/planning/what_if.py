"""`compare_placements` and `compare_devices`: placements, redundant slots and numbers of devices side by side."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmoe.checks import flag, integer, real_number
from jaxmoe.hardware import get_gpu
from jaxmoe.mesh import EP
from jaxmoe.placement import RoutingTrace
from jaxmoe.planning.measured import read_measured
from jaxmoe.planning.memory import plan_config
from jaxmoe.planning.planned import PlannedCheckpoint, keeps_packed
from jaxmoe.planning.roofline import Phase, StepTime, TimeModel
from jaxmoe.planning.routing import (
    AnyPlacement,
    checked_halves,
    layer_skew,
    resolve_placement,
    sent_per_token,
)
from jaxmoe.planning.search import MeshChoice, MeshSearch, search_meshes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementChoice:
    """One placement of all layers on a mesh, with what it takes of memory and its modeled times.

    Attributes:
        placement: name of the strategy, or of a placement that was given.
        redundancy: slots of each device beyond those that hold every expert once.
        bytes_per_device: bytes of weights and cache on the fullest device.
        replica_bytes: those of replicas of experts.
        fits: whether the fullest device has room for all of them.
        largest_batch: most sequences of that length that there is room for.
        skew: the most rows of a device over their mean, in every MoE layer; empty without a trace.
        sent_per_token: bytes of activations that a token sends to other devices, there and back, in all layers; None
            without a trace that has token-level choices.
        decode: modeled time of a decode step.
        prefill: modeled time of the prefill.
    """

    placement: str
    redundancy: int
    bytes_per_device: int
    replica_bytes: int
    fits: bool
    largest_batch: int
    skew: tuple[float, ...]
    sent_per_token: float | None
    decode: StepTime
    prefill: StepTime

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain types, for JSON."""
        times = {"decode_seconds": self.decode.seconds, "prefill_seconds": self.prefill.seconds}
        return dataclasses.asdict(self) | times


def compare_placements(
    path: str | Path,
    placements: Sequence[str] | Mapping[str, AnyPlacement],
    *,
    device: str,
    redundancy: Sequence[int] = (0,),
    trace: RoutingTrace | None = None,
    dp: int = 1,
    tp: int = 1,
    ep: int = 1,
    expert_axes: tuple[str, ...] = (EP,),
    batch_size: int = 64,
    max_length: int | None = None,
    prompt_length: int | None = None,
    devices_per_node: int = 8,
    dtype: str | None = None,
    quantized: str = "keep",
    mtp: bool = False,
    measured: str | Path | Sequence[str | Path] | None = None,
) -> list[PlacementChoice]:
    """Plan a model on one mesh with every placement, and every number of redundant slots.

    Args:
        path: checkpoint, given as for `jaxmoe.plan`.
        placements: strategies' names, or {name: placement as for `jaxmoe.plan`}.
        device: kind of every device, a name in `jaxmoe.hardware.GPUS`.
        redundancy: slots of each device beyond those that hold every expert once, one number or several to compare.
        trace: routing trace, whose second half tells the load of every slot, and whose first half strategies place by;
            None for even routing.
        dp, tp, ep, expert_axes, dtype, quantized, mtp: arguments of `jaxmoe.plan`.
        batch_size, max_length, prompt_length, devices_per_node, measured: arguments of `search_meshes`.

    Returns:
        A choice for each pair, all placements of one redundancy together.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: a size, name or trace does not fit, a placement cannot be made, or the checkpoint cannot be loaded.

    Example:
        >>> from jaxmoe.placement.synthetic import synthetic_trace
        >>> trace = synthetic_trace(num_experts=32, experts_per_token=4, num_layers=24, tokens_per_window=64)
        >>> config = "docs/configs/gpt-oss-20b"
        >>> linear, eplb = compare_placements(config, ["linear", "eplb"], device="h100", ep=4, trace=trace)
        >>> sum(linear.skew) > sum(eplb.skew)
        True
    """
    gpu, checkpoint = get_gpu(device), PlannedCheckpoint.read(path, mtp=flag("mtp", mtp))
    found, keep = read_measured(measured, gpu), keeps_packed(quantized)
    past, future = checked_halves(checkpoint.config, trace)
    sizes = {name: integer(name, size, least=1) for name, size in {"dp": dp, "tp": tp, "ep": ep}.items()}
    named = placements if isinstance(placements, Mapping) else {name: name for name in placements}
    choices = []
    for extra in redundancy:
        for name, placement in named.items():
            placed = resolve_placement(checkpoint.config, placement, sizes, expert_axes, past=past, redundancy=extra)
            report = plan_config(
                checkpoint.config,
                dp=dp,
                tp=tp,
                ep=ep,
                placement=placed,
                expert_axes=expert_axes,
                dtype=dtype,
                batch_size=batch_size,
                max_length=max_length,
                prompt_length=prompt_length,
                device=device,
                checkpoint=checkpoint,
                keep=keep,
            )
            model = checkpoint.model(
                sizes=sizes,
                placement=placed,
                expert_axes=expert_axes,
                dtype=report.dtype,
                keep=keep,
            )

            times = TimeModel(model, gpu=gpu, devices_per_node=devices_per_node, trace=future, measured=found)
            # There is a kind of device.
            assert report.fits is not None
            assert report.largest_batch is not None
            choices.append(
                PlacementChoice(
                    placement=name,
                    redundancy=extra,
                    bytes_per_device=max(report.bytes_per_device.values()),
                    replica_bytes=int(report.parts["replicas"].max()) if "replicas" in report.parts else 0,
                    fits=report.fits,
                    largest_batch=report.largest_batch,
                    skew=() if future is None else layer_skew(model, future),
                    sent_per_token=None if future is None else sent_per_token(model, future),
                    decode=times("decode", batch_size=batch_size, length=report.max_length),
                    prefill=times("prefill", batch_size=batch_size, length=report.prompt_length),
                )
            )
    return choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevicesChoice:
    """The best mesh of one number of devices, and what it costs.

    Attributes:
        devices: number of devices.
        search: meshes of so many devices.
        price_per_hour: price of one device for an hour, in any currency; None for no prices.
        gain: tokens per second over those of the number of devices before, by the step that ranks; None for the first, and
            where one of the two has no mesh that fits.
    """

    devices: int
    search: MeshSearch
    price_per_hour: float | None = None
    gain: float | None = None

    @property
    def best(self) -> MeshChoice | None:
        """The fastest mesh; None where the model fits on none."""
        return next(iter(self.search.choices), None)

    def tokens_per_second(self, phase: Phase) -> float | None:
        """Tokens of all devices in a second of decode steps, or of prefills; None where the model does not fit."""
        return None if self.best is None else getattr(self.best, phase).tokens_per_second

    def cost_per_million(self, phase: Phase) -> float | None:
        """Price of a million tokens that are generated ("decode") or read ("prefill"); None without a price or a mesh."""
        rate = self.tokens_per_second(phase)
        return (
            None
            if rate is None or self.price_per_hour is None
            else self.devices * self.price_per_hour / 3600 / rate * 1e6
        )

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain types, for JSON."""
        phases: tuple[Phase, Phase] = ("decode", "prefill")
        return {
            "devices": self.devices,
            "price_per_hour": self.price_per_hour,
            "gain": self.gain,
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "tokens_per_second": {phase: self.tokens_per_second(phase) for phase in phases},
            "cost_per_million": {phase: self.cost_per_million(phase) for phase in phases},
            "search": self.search.to_dict(),
        }


def compare_devices(
    path: str | Path, devices: Sequence[int], *, device: str, price_per_hour: float | None = None, **options: Any
) -> list[DevicesChoice]:
    """Find the best mesh for every number of devices, the batch being the same.

    Args:
        path: checkpoint, given as for `jaxmoe.plan`.
        devices: numbers of devices, each more than the one before.
        device: kind of every device, a name in `jaxmoe.hardware.GPUS`.
        price_per_hour: price of one device for an hour, in any currency.
        **options: further arguments of `search_meshes`, the same for all numbers.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: a size or name does not fit, the numbers do not rise, or the checkpoint cannot be loaded.

    Example:
        >>> one, two = compare_devices("docs/configs/gpt-oss-20b", [1, 2], device="h100", price_per_hour=2, batch_size=1)
        >>> 1 < two.gain < 2 and two.cost_per_million("decode") > one.cost_per_million("decode")
        True
    """
    if not devices or any(more <= fewer for fewer, more in itertools.pairwise(devices)):
        raise ValueError(f"devices are numbers, each more than the one before; got {list(devices)}")
    if price_per_hour is not None:
        price_per_hour = real_number("price_per_hour", price_per_hour, above=0)
    choices: list[DevicesChoice] = []
    for number in devices:
        search = search_meshes(path, number, device=device, **options)
        choice = DevicesChoice(devices=number, search=search, price_per_hour=price_per_hour)
        before = choices[-1].tokens_per_second(search.rank_by) if choices else None
        rate = choice.tokens_per_second(search.rank_by)
        choices.append(dataclasses.replace(choice, gain=None if before is None or rate is None else rate / before))
    return choices
