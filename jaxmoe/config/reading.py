"""The reading of a checkpoint's ``config.json``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_REQUIRED = object()


def read_config_json(directory: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint directory.

    Raises:
        FileNotFoundError: the directory or its config.json is not there.
        ValueError: it is no JSON object, or names no model_type.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"a checkpoint is a directory with config.json, as transformers' save_pretrained writes it: "
            f"{path} does not exist"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f'{path} names no model family: "model_type" is missing')
    return config


def pick(config: Mapping[str, Any], *names: str, default: Any = _REQUIRED) -> Any:
    """The value of the first of `names` that is present and not null.

    Checkpoints spell one setting in several ways; this is where the spellings meet.

    Raises:
        ValueError: none is there and no `default` is given.
    """
    for name in names:
        if config.get(name) is not None:
            return config[name]
    if default is _REQUIRED:
        raise ValueError(f"config.json needs one of {', '.join(names)}; none is there")
    return default


def read_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype's name in either spelling: ``"dtype": "bfloat16"`` or ``"torch_dtype": "torch.bfloat16"``."""
    name = pick(config, "dtype", "torch_dtype", default=None)
    return None if name is None else str(name).removeprefix("torch.")


def read_common(config: Mapping[str, Any], *, norm_eps: float) -> dict[str, Any]:
    """The fields of a `DecoderConfig` that most families spell alike; `norm_eps` is the family's default."""
    return {
        "model_type": config["model_type"],
        "vocab_size": pick(config, "vocab_size"),
        "hidden_size": pick(config, "hidden_size"),
        "norm_eps": pick(config, "rms_norm_eps", default=norm_eps),
        "tie_word_embeddings": pick(config, "tie_word_embeddings", default=False),
        "max_position_embeddings": pick(config, "max_position_embeddings"),
        "dtype": read_dtype(config),
    }
