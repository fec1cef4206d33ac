"""The report of a load: what was read, what each device holds, what was ignored."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax

from jaxmoe.quant.encode import QuantizationLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """The part of a report that is about a LoRA adapter.

    Attributes:
        path: the adapter's directory.
        factors: tensors of low-rank updates in the adapter; every one of them is merged, or held beside the weights.
        bytes_read: bytes of those that this process read.
        merged: {name of a tensor, with * for the numbers of layers and experts: count of that name that were changed}.
        replaced: tensors of the model that the adapter has whole, and that were read from its file.
    """

    path: str
    factors: int
    bytes_read: int
    merged: dict[str, int]
    replaced: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The bytes that one process read, those that its devices hold, and the tensors that it ignored.

    Attributes:
        bytes_read: bytes of the checkpoint's tensor data that the system reported as read.
        bytes_needed: bytes on disk that this process's devices need, each counted once.
        seconds: wall-clock time of reading and placing.
        tensors_read: tensors of which something was read.
        bytes_per_device: {device id: bytes of parameters on it}.
        expert_bytes_per_device: {device id: bytes of expert stacks on it, padding slots included}.
        ignored: {rule name: tensors of the checkpoint that were not needed}.
        adapter: adapter that was merged, None where none was.
        adapters: adapters that are held beside the weights, by name.
        adapter_bytes_per_device: {device id: bytes of their factors, free places included}; no part of the bytes above.
        packed: {quantized format and its settings: weights of the checkpoint in it that are held packed}.
        decoded: the same for those whose values are held as plain numbers. A scale that counts for two pieces of a weight
            is read for each, so `bytes_read` may be above `bytes_needed`.
        held: {part of the model: {packed form, or a dtype: matrices or stacks that the devices hold in it}}, as in a plan.
        activations: {form of activations that the checkpoint asks for, in words: parts of the model}; `held` has those that
            are in effect.
        notes: sentences about the quantization, the reasons why weights are decoded among them, and why activations stay as
            they are where they were to be rounded.
        quantized: format that linear layers were quantized to while they were loaded, None where none were.
        losses: differences that this made, by layer and kind; replicas of an expert count each.
        renamed: {rule: tensors of the checkpoint that had other names than the family gives them}.
    """

    bytes_read: int
    bytes_needed: int
    seconds: float
    tensors_read: int
    bytes_per_device: dict[int, int]
    expert_bytes_per_device: dict[int, int]
    ignored: dict[str, tuple[str, ...]]
    adapter: AdapterReport | None = None
    adapters: dict[str, AdapterReport] = dataclasses.field(default_factory=dict)
    adapter_bytes_per_device: dict[int, int] = dataclasses.field(default_factory=dict)
    packed: dict[str, int] = dataclasses.field(default_factory=dict)
    decoded: dict[str, int] = dataclasses.field(default_factory=dict)
    held: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    activations: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    quantized: str | None = None
    losses: tuple[QuantizationLoss, ...] = ()
    renamed: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        """Rate of the whole load."""
        return self.bytes_read / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain types, for JSON."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """The report in a few lines: what was read, which quantized weights stay packed, and which are decoded and why.

        What activations the checkpoint asks for is said too, and whether they are rounded so.
        """
        rate = self.bytes_per_second / 1e9
        lines = [
            f"read {self.bytes_read:,} bytes of {self.tensors_read:,} tensors in {self.seconds:.3g} s ({rate:.2g} GB/s)"
        ]
        for what, formats in (("kept packed", self.packed), ("decoded", self.decoded)):
            lines += [f"{what}: {count:,} weights in {form}" for form, count in formats.items()]
        for words, parts in self.activations.items():
            held = {part: self.held.get(part, {}) for part in parts}
            done = [part for part, forms in held.items() if any(form.endswith(f"inputs in {words}") for form in forms)]
            effect = f"of {', '.join(done)} are rounded to it" if done else "stay as they are"
            lines.append(f"the checkpoint asks for activations in {words} ({', '.join(parts)}): those {effect}")
        if self.adapters:
            most = max(self.adapter_bytes_per_device.values(), default=0)
            lines.append(
                f"adapters beside the weights: {', '.join(self.adapters)}; {most:,} bytes on the fullest device"
            )
        return "\n".join([*lines, *self.notes])


def bytes_per_device(arrays: Iterable[jax.Array]) -> dict[int, int]:
    """Count the bytes of arrays on each device of this process, by its id."""
    total: Counter[int] = Counter()
    for array in arrays:
        for shard in array.addressable_shards:
            total[shard.device.id] += shard.data.nbytes
    return dict(sorted(total.items()))
