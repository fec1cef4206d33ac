"""The reading of a checkpoint's ``config.json``."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.config.agreement import check_equal
from jaxmoe.config.places import directory_of, find_checkpoint

_REQUIRED = object()
_PERIODS = re.compile(
    r".*_(step|interval|period|freq)|.*_every_n_layers|n_heads"
)  # what layers are counted, or widths divided, by
_PARTS = ("text_config", "language_config", "llm_config", "thinker_config", "ffn_config")
_MOST = {"num_hidden_layers": 10_000, "n_layers": 10_000}  # a layer is an object, before there is a tensor to ask for


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint, which is given as for `find_checkpoint`.

    Raises:
        FileNotFoundError: the directory or its config.json is not there.
        ValueError: it is no JSON object, or names no model_type.
    """
    path = directory_of(find_checkpoint(directory)) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"a checkpoint is a directory with config.json, as transformers' save_pretrained writes it: "
            f"{path} does not exist"
        )
    config = _parse(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(
            f'{path} names no model family: "model_type" is missing'
            f"{way_to_file(path.read_bytes(), ': take the config.json that transformers wrote')}"
        )
    return config


def way_to_file(start: bytes, otherwise: str = "; download it again") -> str:
    """Say how to get a file in whose place something else was downloaded: ``"; it is a pointer of git-lfs: ..."``.

    Args:
        start: first bytes of what is there, 16 or more.
        otherwise: text for bytes that do not tell what they are.
    """
    if start.startswith(b"version https://"):
        return "; it is a pointer of git-lfs: fetch the file itself with git lfs pull"
    text = start.lstrip()
    if text.startswith((b"<", b"Access to ", b"Invalid ", b"Entry not found")) or re.match(rb'\{\s*"error"', text):
        return "; it is a server's answer and not the file: log in, ask for access where it is gated, and download it again"
    return otherwise


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a checkpoint that may be missing; it is empty where there is no such file.

    Raises:
        ValueError: there is something else in it.
    """
    if not path.is_file():
        return {}
    value = _parse(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds one JSON object; got {type(value).__name__}")
    return value


def config_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List a config and the configs of a model's parts that are in it, in any spelling; the outermost first."""
    nested = [config[key] for key in _PARTS if isinstance(config.get(key), dict)]
    return [config, *nested, *[part["text_config"] for part in nested if isinstance(part.get("text_config"), dict)]]


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits, deep nesting
        raise ValueError(f"{path} is not readable as JSON: {error}{way_to_file(path.read_bytes())}") from error


def pick(config: Mapping[str, Any], *names: str, default: Any = _REQUIRED) -> Any:
    """Take the value of the first of `names` that is present and not null.

    Checkpoints spell one setting in several ways; this is where the spellings meet.

    Raises:
        ValueError: none is there and no `default` is given, or the value is of another kind than the default: without
            one it is a size, an integer of at least 1. Or several of `names` are there and differ.
    """
    if len(names) > 1:
        check_equal((name, config.get(name)) for name in names)
    for name in names:
        value = config.get(name)
        if value is not None:
            _check_kind(name, value, 1 if default is _REQUIRED else default)
            counted = default is _REQUIRED or (_PERIODS.fullmatch(name) and not isinstance(value, list))
            if counted and not 1 <= value <= _MOST.get(name, value):
                most = f" and at most {_MOST[name]}" if name in _MOST else ""
                raise ValueError(f"{name} in config.json is at least 1{most}; it is {value}")
            return value
    if default is _REQUIRED:
        which = f"one of {', '.join(names)}; none is" if len(names) > 1 else f"{names[0]}; it is not"
        raise ValueError(f"config.json needs {which} there")
    return default


def _check_kind(name: str, value: Any, default: Any) -> None:
    """Refuse a value that is not of the kind of `default`; None is of no kind."""
    kinds: dict[type, tuple[str, tuple[type, ...]]] = {
        bool: ("true or false", (bool,)),
        int: ("an integer", (int,)),
        float: ("a number", (int, float)),
        str: ("a string", (str,)),
        dict: ("an object", (dict,)),
        list: ("a list", (list,)),
        range: ("a list", (list,)),
    }
    if default is None:
        return
    what, types = kinds[type(default)]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f"{name} in config.json is {what}; it is {value!r:.80}")


def pick_layer_types(config: Mapping[str, Any], usual: list[str], *known: str, name: str = "layer_types") -> list[str]:
    """Read the kind of each layer from the list `name`, or take `usual` where there is none.

    Raises:
        ValueError: it has another number of layers than `usual`, or a kind that is none of `known`.
    """
    kinds: list[Any] = pick(config, name, default=usual)
    if len(kinds) != len(usual):
        raise ValueError(f"{name} has a kind for each of the {len(usual)} layers; it has {len(kinds)}")
    unknown = sorted({repr(kind) for kind in kinds if kind not in known})
    if unknown:
        raise ValueError(
            f"{name} of {config['model_type']} are {' and '.join(known)}; config.json has {', '.join(unknown)}"
        )
    return kinds


def pick_layer_flags(config: Mapping[str, Any], name: str, usual: list[bool]) -> list[bool]:
    """Read a list that has 0 or 1 for each layer, or take `usual` where there is none.

    Raises:
        ValueError: it has another number of layers than `usual`, or anything else in it.
    """
    flags: list[Any] = pick(config, name, default=usual)
    if len(flags) != len(usual) or any(flag not in (0, 1) for flag in flags):
        raise ValueError(f"{name} in config.json has 0 or 1 for each of the {len(usual)} layers; it is {flags!r:.80}")
    return [bool(flag) for flag in flags]


def read_dtype(config: Mapping[str, Any]) -> str | None:
    """Read the dtype's name in either spelling: ``"dtype": "bfloat16"`` or ``"torch_dtype": "torch.bfloat16"``."""
    name = pick(config, "dtype", "torch_dtype", default=None)
    return None if name is None else str(name).removeprefix("torch.")


def read_common(
    config: Mapping[str, Any], *, norm_eps: float, tied: bool = False, positions: int | None = None
) -> dict[str, Any]:
    """Read the fields of a `DecoderConfig` that most families spell alike.

    Args:
        config: dictionary of config.json.
        norm_eps, tied, positions: epsilon, ``tie_word_embeddings`` and ``max_position_embeddings`` of the family where
            config.json gives none; without `positions` it has to.
    """
    return {
        "model_type": config["model_type"],
        "vocab_size": pick(config, "vocab_size"),
        "hidden_size": pick(config, "hidden_size"),
        "norm_eps": pick(config, "rms_norm_eps", default=norm_eps),
        "tie_word_embeddings": pick(config, "tie_word_embeddings", default=tied),
        "max_position_embeddings": pick(
            config, "max_position_embeddings", default=_REQUIRED if positions is None else positions
        ),
        "dtype": read_dtype(config),
    }
