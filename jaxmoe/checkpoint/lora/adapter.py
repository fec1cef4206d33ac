"""LoRA adapters as PEFT saves them: a directory with a configuration and a file of factors."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats import (
    SafetensorsFile,
    TensorInfo,
    TorchFile,
    can_cast,
    read_safetensors,
    read_torch_file,
)
from jaxmoe.checkpoint.lora.config import LoraConfig, read_lora_config

_CONFIG = "adapter_config.json"
_SAFETENSORS, _TORCH = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_UPDATE = re.compile(r"\.(lora_|token_adapter\.)|\.bias$")
_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter whose factors are not read yet; made by `open_adapter`.

    Attributes:
        path: its directory.
        config: settings of merging.
        file: file of its tensors.
    """

    path: Path
    config: LoraConfig
    file: SafetensorsFile | TorchFile

    @property
    def factors(self) -> dict[str, TensorInfo]:
        """Tensors of low-rank updates, and all others that are not whole ones, by their names in the file."""
        return {name: tensor for name, tensor in self.file.tensors.items() if whole_name(name) is None}

    @property
    def whole(self) -> dict[str, TensorInfo]:
        """Tensors that stand in for those of the model, by the names that transformers gives these."""
        found = {whole_name(name): tensor for name, tensor in self.file.tensors.items()}
        return {name: tensor for name, tensor in found.items() if name is not None}


def whole_name(name: str) -> str | None:
    """Give the name that transformers has for a tensor that an adapter has whole; None for a part of an update.

    Example:
        >>> whole_name("base_model.model.lm_head.weight"), whole_name("base_model.model.q_proj.lora_A.weight")
        ('lm_head.weight', None)
    """
    if _UPDATE.search(name) or not name.startswith(_PREFIX):
        return None
    # PEFT keeps a replaced module, and one with factors, inside of another.
    return re.sub(r"\.(base_layer|modules_to_save(\.\w+)?)(?=\.\w+$)", "", name.removeprefix(_PREFIX))


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read the configuration of an adapter and the header of its factors.

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


def _missing(path: Path, name: str) -> FileNotFoundError:
    """Say what is there instead: most often a model, or one of a trainer's checkpoints."""
    found = ", ".join(sorted(file.name for file in path.iterdir())[:4]) or "nothing"
    return FileNotFoundError(
        f"{path}: an adapter is a directory with {_CONFIG} and {_SAFETENSORS} or {_TORCH}; there is no {name}, there is "
        f"{found}; name the directory that PEFT's save_pretrained wrote"
    )
