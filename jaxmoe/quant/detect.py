"""Find the quantization that a checkpoint's files declare, in config.json or beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoe.config import config_parts, read_json
from jaxmoe.quant.configs import READERS, Reader, settings
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.rules import Quantization

SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside config.json that may hold a block: ModelOpt's, GPTQ's and AWQ's."""

_KEYS = ("quantization_config", "compression_config")
_MLX_KEY = "quantization"

# Names of other methods, and what is to be said of each beyond that jaxmoe does not decode it.
_OTHERS = {
    "mlx": "a block with bits and group_size and no quant_method is of MLX, whose weights are packed for Apple's GPUs",
    "auto-round": "AutoRound writes GPTQ's layout too (format auto_gptq)",
    "gguf": "GGUF has a converter in llama.cpp",
}


class DeclaredSettings(NamedTuple):
    """Settings of a quantization as they stand in a checkpoint's files.

    Attributes:
        block: the settings.
        part: config of the model, or of the part of it, that they are of.
        source: name of the file that they are in.
        beside: settings in other files, which are not read, by the name of the file.
    """

    block: Mapping[str, Any]
    part: Mapping[str, Any]
    source: str
    beside: Mapping[str, Mapping[str, Any]]

    @property
    def method(self) -> str:
        """The method of the block, by its name or by the settings that only one method has."""
        named = self.block.get("quant_method")
        if isinstance(named, str) and named:
            return named.lower()
        for method, keys in (
            ("modelopt", ("quant_algo",)),
            ("compressed-tensors", ("config_groups",)),
            ("gptq", ("desc_act",)),
            ("awq", ("w_bit", "zero_point")),
            ("bitsandbytes", ("load_in_4bit", "load_in_8bit")),
            ("mlx", ("bits",)),
        ):
            if any(key in self.block for key in keys):
                return method
        return "unnamed"


def read_quantization(directory: Path, config: Mapping[str, Any] | None = None) -> Quantization | None:
    """The quantization that the files of a checkpoint declare, None where they declare none.

    Args:
        directory: folder with the checkpoint's files.
        config: contents of config.json, where they were read before.

    Raises:
        QuantizationError: it is of a kind that jaxmoe does not decode, or its settings are wrong.
    """
    config = read_json(directory / "config.json") if config is None else config
    return find_quantization(config, read_side_files(directory))


def read_side_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Read the contents of `SIDE_FILES` in a directory by name; those of a file that is missing are empty."""
    return {name: read_json(directory / name) for name in SIDE_FILES}


def find_quantization(
    config: Mapping[str, Any], side_files: Mapping[str, Mapping[str, Any]] | None = None
) -> Quantization | None:
    """The quantization that settings declare: that of config.json, else of the first file beside it that has one.

    Args:
        config: contents of config.json.
        side_files: contents of `SIDE_FILES` by name; those that are empty count as absent.

    Raises:
        QuantizationError: it is of a kind that jaxmoe does not decode, or its settings are wrong.

    >>> block = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    >>> found = find_quantization({"quantization_config": block})
    >>> found.format_of("model.layers.0.mlp.experts.3.up_proj").name, found.format_of("lm_head")
    ('fp8_block', None)
    """
    declared = find_settings(config, side_files or {})
    return None if declared is None else _read(declared, config)


def find_settings(config: Mapping[str, Any], side_files: Mapping[str, Mapping[str, Any]]) -> DeclaredSettings | None:
    """Find the settings that `find_quantization` reads, whether or not jaxmoe decodes their method; arguments as there.

    None where there are none.
    """
    parts = config_parts(config)
    beside = {name: _inner(document) for name, document in side_files.items() if document}
    for part in parts:
        for key in _KEYS:
            block = part.get(key)
            if isinstance(block, dict) and block:
                return DeclaredSettings(block, part, "config.json", beside)
    for name, block in beside.items():
        return DeclaredSettings(block, config, name, {})
    for part in parts:
        if isinstance(part.get(_MLX_KEY), dict):
            return DeclaredSettings(part[_MLX_KEY], part, "config.json", {})
    return None


def _inner(document: Mapping[str, Any]) -> Mapping[str, Any]:
    # ModelOpt has its settings one level down, beside the producer's name.
    inner = document.get("quantization")
    return inner if isinstance(inner, dict) else document


def _read(declared: DeclaredSettings, config: Mapping[str, Any]) -> Quantization:
    block, source, method = declared.block, declared.source, declared.method
    notes: list[str] = []
    for name, other in declared.beside.items():
        said, also = block.get("quant_algo"), other.get("quant_algo")
        if also is not None and said is not None and also != said:
            raise QuantizationError(
                f"{source} and {name} must agree: quant_algo is {said!r:.60} in one and {also!r:.60} in the other; "
                "remove the file that is not of these weights"
            )
        notes += [] if settings.cache_note(block) else settings.cache_note(other)
        notes.append(f"{name} is not read: {source} has the quantization")
    if method not in READERS:
        # A method has several spellings; its first is its name.
        known = ", ".join(name for name, read in READERS.items() if name == _first_name(read))
        more = f" ({_OTHERS[method]})" if method in _OTHERS else ""
        raise QuantizationError(
            f"{source} says quantization {method!r:.60}{more}, which is none that jaxmoe decodes: it decodes {known}. Take "
            "the model's bfloat16 release, or one of these"
        )
    try:
        rules, told = READERS[method]({**block}, {**config, **declared.part})
    except QuantizationError as error:
        raise QuantizationError(f"{source}, quantization {method}: {error}") from error
    return Quantization(method, source, rules, (*told, *notes))


def _first_name(reader: Reader) -> str:
    return next(name for name, read in READERS.items() if read is reader)
