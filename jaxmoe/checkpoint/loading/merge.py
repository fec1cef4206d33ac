"""The merging of a LoRA adapter into a load plan.

Merging changes no file and makes no whole weight: the plan gets the update of each tensor, and every piece of it that
is read has its part of the update added, in float32, before it is cast to the parameter's dtype.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable

import numpy as np

from jaxmoe.checkpoint.boxes import whole
from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.formats import Checkpoint, SafetensorsFile, TorchFile, can_cast, open_files, read_box
from jaxmoe.checkpoint.loading.plan import LoadPlan
from jaxmoe.checkpoint.loading.report import AdapterReport
from jaxmoe.checkpoint.lora import Adapter, LowRankUpdate, TensorDelta, find_updates

_FLOAT32 = np.dtype(np.float32)


def merge_adapter(
    plan: LoadPlan,
    checkpoint: Checkpoint,
    adapter: Adapter,
    *,
    rename: Callable[[str], str] = str,
) -> LoadPlan:
    """Make a load plan that merges an adapter, which gives what PEFT's ``merge_and_unload`` does.

    The factors are read here, in their own dtype, and kept with the plan; of an adapter of single experts only those
    whose tensors the plan reads.

    Args:
        plan: plan of the checkpoint without the adapter.
        checkpoint: checkpoint that the plan was made for.
        adapter: adapter from `open_adapter`.
        rename: function from the name that the adapter has for a tensor to the checkpoint's, see `Spellings.find`.

    Raises:
        CheckpointError: not every tensor of the adapter belongs to a tensor that the model uses and can be added to;
            or the adapter's file changed since it was opened, or could not be read.
    """
    replaced = sorted(name for name, tensor in checkpoint.tensors.items() if tensor.file == adapter.file.path)
    if adapter.whole and not replaced:
        raise CheckpointError(
            f"{adapter.path}: the adapter has whole tensors, such as {next(iter(adapter.whole))!r}, which take the place of "
            "the checkpoint's before a plan is made; load it with jaxmoe.load"
        )
    try:
        updates = updates_of(adapter, checkpoint, rename)
        by_tensor: dict[str, list[LowRankUpdate]] = defaultdict(list)
        for update in updates:
            by_tensor[update.target].append(update)
        _check_targets(by_tensor, plan, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{adapter.path}: {error}") from None

    read = {read.tensor.name for read in plan.reads}
    names = {name for update in updates if update.target in read for name in (update.a, update.b)}
    factors, bytes_read = read_factors(adapter.file, names)
    deltas = {}
    for name, own in by_tensor.items():
        if name in read:
            split = plan.splits.get(name, ())
            deltas[name] = TensorDelta(tuple(own), factors, checkpoint.tensors[name].split(split).dim_order, split)
    report = AdapterReport(
        path=str(adapter.path),
        factors=len(adapter.factors),
        replaced=tuple(replaced),
        bytes_read=bytes_read,
        merged=count_by_kind(by_tensor),
    )
    return dataclasses.replace(plan, deltas=deltas, adapter=report)


def updates_of(adapter: Adapter, checkpoint: Checkpoint, rename: Callable[[str], str] = str) -> list[LowRankUpdate]:
    """Find what the factors of an adapter change in a checkpoint; arguments as for `merge_adapter`.

    Raises:
        CheckpointError: see `find_updates`.
    """
    return find_updates(
        adapter.config,
        {name: tensor.shape for name, tensor in adapter.factors.items()},
        {name: tensor.shape for name, tensor in checkpoint.tensors.items()},
        rename=rename,
    )


def count_by_kind(names: Iterable[str]) -> dict[str, int]:
    """Count names of tensors with * for the numbers of layers and experts, each once."""
    return dict(sorted(Counter(re.sub(r"\b\d+\b", "*", name) for name in set(names)).items()))


def _check_targets(by_tensor: dict[str, list[LowRankUpdate]], plan: LoadPlan, checkpoint: Checkpoint) -> None:
    """Every tensor that is adapted is used by the model and holds plain numbers."""
    ignored = {name: rule for rule, names in plan.ignored.items() for name in names}
    problems = Problems("the adapter")
    for name in by_tensor:
        tensor = checkpoint.tensors[name]
        if name in ignored:
            problems.add(
                f"what it adapts must be in the model; {name!r} is not, by the rule {ignored[name]!r}; train the adapter "
                "without it"
            )
        elif tensor.dtype is None or not can_cast(tensor.dtype, _FLOAT32):
            problems.add(
                f"it can be added to BF16, F16, F32 and F64; {name!r} is {tensor.dtype_name}; merge it into the checkpoint "
                "before that is quantized"
            )
    problems.raise_if_any()


def read_factors(file: SafetensorsFile | TorchFile, names: Collection[str]) -> tuple[dict[str, np.ndarray], int]:
    """The named tensors of an adapter's file, and the bytes that were read for them."""
    factors, count = {}, 0
    with open_files([file]) as descriptors:
        for name in sorted(names, key=lambda name: file.tensors[name].offset):
            tensor = file.tensors[name].as_stored()
            assert tensor.dtype is not None
            values = np.empty(tensor.shape, tensor.dtype)
            count += read_box(descriptors, tensor, whole(tensor.shape), values)
            order = file.tensors[name].dim_order
            factors[name] = values if order is None else values.transpose(np.argsort(order))
    return factors, count
