"""Find the quantization that a checkpoint's files declare, in config.json or beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.config import read_json
from jaxmoe.quant.configs import READERS, Reader, settings
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.rules import Quantization

SIDE_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files beside config.json that may hold a block: ModelOpt's, GPTQ's and AWQ's."""

_KEYS = ("quantization_config", "compression_config")
_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")

# Names of other methods, and what is to be said of each beyond that jaxmoe does not decode it.
_OTHERS = {
    "mlx": "a block with bits and group_size and no quant_method is of MLX, whose weights are packed for Apple's GPUs",
    "auto-round": "AutoRound writes GPTQ's layout too (format auto_gptq)",
    "gguf": "GGUF has a converter in llama.cpp",
}


def read_quantization(directory: Path, config: Mapping[str, Any] | None = None) -> Quantization | None:
    """The quantization that the files of a checkpoint declare, None where they declare none.

    Args:
        directory: folder with the checkpoint's files.
        config: contents of config.json, where they were read before.

    Raises:
        QuantizationError: it is of a kind that jaxmoe does not decode, or its settings are wrong.
    """
    config = read_json(directory / "config.json") if config is None else config
    return find_quantization(config, {name: read_json(directory / name) for name in SIDE_FILES})


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
    beside = {name: _inner(document) for name, document in (side_files or {}).items() if document}
    for part in _parts(config):
        for key in _KEYS:
            block = part.get(key)
            if isinstance(block, dict) and block:
                return _read(block, part, config, "config.json", beside)
    for name, block in beside.items():
        return _read(block, config, config, name, {})
    if isinstance(config.get("quantization"), dict):
        return _read(config["quantization"], config, config, "config.json", {})
    return None


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and the configs of parts of a model in it."""
    nested = [config[key] for key in _NESTED if isinstance(config.get(key), dict)]
    return [config, *nested, *[part["text_config"] for part in nested if isinstance(part.get("text_config"), dict)]]


def _inner(document: Mapping[str, Any]) -> Mapping[str, Any]:
    # ModelOpt has its settings one level down, beside the producer's name.
    inner = document.get("quantization")
    return inner if isinstance(inner, dict) else document


def _read(
    block: Mapping[str, Any],
    part: Mapping[str, Any],
    config: Mapping[str, Any],
    source: str,
    beside: Mapping[str, Mapping[str, Any]],
) -> Quantization:
    method = _method(block)
    notes: list[str] = []
    for name, other in beside.items():
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
        rules, told = READERS[method]({**block}, {**config, **part})
    except QuantizationError as error:
        raise QuantizationError(f"{source}, quantization {method}: {error}") from error
    return Quantization(method, source, rules, (*told, *notes))


def _first_name(reader: Reader) -> str:
    return next(name for name, read in READERS.items() if read is reader)


def _method(block: Mapping[str, Any]) -> str:
    """The method of a block, by its name or by the settings that only one method has."""
    named = block.get("quant_method")
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
        if any(key in block for key in keys):
            return method
    return "unnamed"
