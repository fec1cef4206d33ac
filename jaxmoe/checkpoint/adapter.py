"""LoRA adapters as PEFT saves them, opened and merged into a load plan.

Merging changes no file and makes no whole weight: the plan gets the update of each tensor, and every piece of it that
is read has its part of the update added, in float32, before it is cast to the parameter's dtype.
"""

import dataclasses
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxmoe.checkpoint.boxes import whole
from jaxmoe.checkpoint.dtypes import can_cast
from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.files import Checkpoint
from jaxmoe.checkpoint.lora import LowRankUpdate, TensorDelta
from jaxmoe.checkpoint.lora_config import LoraConfig, read_lora_config
from jaxmoe.checkpoint.lora_match import find_updates
from jaxmoe.checkpoint.plan import LoadPlan
from jaxmoe.checkpoint.reading import open_files, read_box
from jaxmoe.checkpoint.report import AdapterReport
from jaxmoe.checkpoint.safetensors import SafetensorsFile, read_safetensors
from jaxmoe.checkpoint.torch_file import TorchFile, read_torch_file

_CONFIG = "adapter_config.json"
_SAFETENSORS, _TORCH = "adapter_model.safetensors", "adapter_model.bin"
_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter whose factors are not read yet; made by `open_adapter`.

    Attributes:
        path: the directory.
        config: what its configuration says of merging.
        file: the file of its factors.
    """

    path: Path
    config: LoraConfig
    file: SafetensorsFile | TorchFile


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read the configuration of an adapter and which factors it has.

    Args:
        path: a directory as PEFT's ``save_pretrained`` writes it, with ``adapter_config.json`` and
            ``adapter_model.safetensors`` or ``adapter_model.bin``; the former is read where both are there.

    Raises:
        CheckpointError: a file breaks a rule, or the adapter is more than low-rank updates of weights.
        FileNotFoundError: there is no such directory, or one of the files is missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such directory; name one with {_CONFIG} and {_SAFETENSORS}")
    if not (path / _CONFIG).is_file():
        raise _missing(path, _CONFIG)
    config = read_lora_config(path / _CONFIG)
    file: SafetensorsFile | TorchFile
    if (path / _SAFETENSORS).is_file():
        file = read_safetensors(path / _SAFETENSORS)
    elif (path / _TORCH).is_file():
        file = read_torch_file(path / _TORCH, allow_permuted=True)
    else:
        raise _missing(path, f"{_SAFETENSORS} or {_TORCH}")
    if not file.tensors:
        raise CheckpointError(
            f"{file.path}: an adapter has factors; this file has no tensors; if a trainer wrote it that splits weights "
            "over processes, gather them (ZeRO-3: stage3_gather_16bit_weights_on_model_save) and save the adapter again"
        )
    for tensor in file.tensors.values():
        if tensor.dtype is None or not can_cast(tensor.dtype, _FLOAT32):
            raise CheckpointError(
                f"{file.path}: the factors of an adapter are BF16, F16, F32 or F64; {tensor.name!r} is "
                f"{tensor.dtype_name}; save the adapter in one of those"
            )
    return Adapter(path, config, file)


def merge_adapter(
    plan: LoadPlan,
    checkpoint: Checkpoint,
    adapter: Adapter,
    *,
    spellings: Sequence[tuple[str, ...]] = (),
    text_name: Callable[[str], str] = str,
) -> LoadPlan:
    """Make a load plan that merges an adapter, which gives what PEFT's ``merge_and_unload`` does.

    The factors are read here, in their own dtype, and kept with the plan; of an adapter of single experts only those
    whose tensors the plan reads.

    Args:
        plan: of the checkpoint without the adapter.
        checkpoint: the same that the plan was made for.
        adapter: from `open_adapter`.
        spellings: parts of names that mean the same, see `Family`.
        text_name: from a name in a multimodal model to that in its text part, see `Family.text_name`. An adapter may
            have been trained on either.

    Raises:
        CheckpointError: not every tensor of the adapter belongs to a tensor that the model uses and can be added to;
            or the adapter's file changed since it was opened, or could not be read.
    """
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    try:
        updates = find_updates(
            adapter.config,
            {name: tensor.shape for name, tensor in adapter.file.tensors.items()},
            shapes,
            rename=lambda name: spelled_as_in(shapes, text_name(name), spellings),
        )
        by_tensor: dict[str, list[LowRankUpdate]] = defaultdict(list)
        for update in updates:
            by_tensor[update.target].append(update)
        _check_targets(by_tensor, plan, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{adapter.path}: {error}") from None

    read = {read.tensor.name for read in plan.reads}
    names = {name for update in updates if update.target in read for name in (update.a, update.b)}
    factors, bytes_read = _read_factors(adapter.file, names)
    deltas = {}
    for name, own in by_tensor.items():
        if name in read:
            split = plan.splits.get(name, ())
            deltas[name] = TensorDelta(tuple(own), factors, checkpoint.tensors[name].split(split).dim_order, split)
    report = AdapterReport(
        path=str(adapter.path),
        factors=len(adapter.file.tensors),
        bytes_read=bytes_read,
        merged=dict(sorted(Counter(re.sub(r"\b\d+\b", "*", name) for name in by_tensor).items())),
    )
    return dataclasses.replace(plan, deltas=deltas, adapter=report)


def spelled_as_in(names: Collection[str], name: str, spellings: Iterable[tuple[str, ...]]) -> str:
    """`name`, or another spelling of it if it is that which is one of `names`.

    Example:
        >>> spelled_as_in({"layers.0.moe.gate"}, "layers.0.mlp.gate", [(".mlp.", ".moe.")])
        'layers.0.moe.gate'
    """
    if name in names:
        return name
    candidates = (name.replace(part, other) for parts in spellings for part in parts for other in parts)
    return next((candidate for candidate in candidates if candidate in names), name)


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
                "before that is quantised"
            )
    problems.raise_if_any()


def _read_factors(file: SafetensorsFile | TorchFile, names: Collection[str]) -> tuple[dict[str, np.ndarray], int]:
    """The named tensors of an adapter's file, and the bytes that were read for them."""
    factors, count = {}, 0
    with open_files([file]) as descriptors:
        for name in sorted(names, key=lambda name: file.tensors[name].offset):
            tensor = file.tensors[name].as_stored()
            assert tensor.dtype is not None
            values = np.empty(tensor.shape, tensor.dtype)
            count += read_box(descriptors[file.path], tensor, whole(tensor.shape), values)
            order = file.tensors[name].dim_order
            factors[name] = values if order is None else values.transpose(np.argsort(order))
    return factors, count


def _missing(path: Path, name: str) -> FileNotFoundError:
    """Say what is there instead: most often a model, or one of a trainer's checkpoints."""
    found = ", ".join(sorted(file.name for file in path.iterdir())[:4]) or "nothing"
    return FileNotFoundError(
        f"{path}: an adapter is a directory with {_CONFIG} and {_SAFETENSORS} or {_TORCH}; there is no {name}, there is "
        f"{found}; name the directory that PEFT's save_pretrained wrote"
    )
