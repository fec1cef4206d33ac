"""What mkdocs.yml asks mkdocstrings to do with docstrings before it reads them: examples become blocks of code."""

import re
from typing import Any

import griffe

_PROMPT = re.compile(r"^(\s*)>>> ")


class ExampleBlocks(griffe.Extension):
    """Puts every doctest in a fenced block, wherever in a docstring it is."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object as it is read."""
        if obj.docstring is not None:
            obj.docstring.value = fence_examples(obj.docstring.value)


def fence_examples(text: str) -> str:
    r"""`text` with a fence around each run of lines that starts with a prompt and ends before a blank line.

    >>> print(fence_examples("Adds.\n\n>>> 1 + 1  # doctest: +SKIP\n2"))
    Adds.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    lines: list[str] = []
    indent: str | None = None  # of the block that is open
    for line in text.splitlines():
        start = _PROMPT.match(line)
        if indent is None and start:
            indent = start[1]
            lines.append(f"{indent}```pycon")
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        lines.append(line.partition("  # doctest:")[0])
    if indent is not None:
        lines.append(f"{indent}```")
    return "\n".join(lines)
