"""The tokens that end a text, as a checkpoint names them."""

from pathlib import Path

from jaxmoe.config import read_json


def eos_token_ids(directory: str | Path) -> frozenset[int]:
    """Read ``eos_token_id`` from ``generation_config.json``, else from ``config.json`` or its text part.

    The first wins because chat models add their end of turn there and leave ``config.json`` as
    the base model had it. A file may have a number or a list of them.

    Returns:
        The ids; empty where no file names any, and text goes on to the token limit.

    Raises:
        ValueError: a file is not readable, or names something else than token ids.
    """
    for name in ("generation_config.json", "config.json"):
        config = read_json(Path(directory) / name)
        value = config.get("eos_token_id")
        thinker = config.get("thinker_config")
        for outer in (config, thinker if isinstance(thinker, dict) else {}):
            if value is None and isinstance(outer.get("text_config"), dict):
                value = outer["text_config"].get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise ValueError(f"eos_token_id is a token id or a list of them; {Path(directory) / name} has {value!r}")
        return frozenset(ids)
    return frozenset()
