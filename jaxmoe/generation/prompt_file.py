"""Prompts from a file or standard input."""

import json
import sys
from pathlib import Path
from typing import Any


def read_prompt_file(path: str) -> list[Any]:
    """Read the prompts of a file, in order.

    Args:
        path: path of the file; "-" for standard input. A ``.jsonl`` file has an object with "prompt" on every line: a
            text, a list of token ids or a list of chat messages. Any other has a text prompt on every line. Blank lines
            are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no prompt, is no UTF-8 text, or a line is not what it should be.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the prompt file {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"a prompt file is UTF-8 text; {path} is not: {error}") from error
    # Not splitlines(): a JSON string may hold the other line separators of Unicode.
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise ValueError(f"a prompt file has a prompt on every line; {path} has none")
    if not path.endswith(".jsonl"):
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{path}:{number}") for number, line in numbered]


def _prompt_of(line: str, where: str) -> Any:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(record, dict) or "prompt" not in record:
        raise ValueError(f'a line of a .jsonl prompt file is an object with "prompt"; {where} is not')
    return record["prompt"]
