"""The error of a quantized checkpoint that cannot be read as what it says it is."""

from collections.abc import Sequence

_SHOWN = 4


class QuantizationError(ValueError):
    """A checkpoint's quantization breaks a rule, or is of no kind that jaxmoe decodes; the message says the way out."""


def raise_problems(subject: str, problems: Sequence[str]) -> None:
    """Raise problems together, in one line: the first few in full and all of them counted.

    Raises:
        QuantizationError: there is at least one.
    """
    if not problems:
        return
    shown = list(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        shown.append(f"and {len(problems) - _SHOWN} more")
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise QuantizationError(f"{subject} has {count}: {'; '.join(shown)}")
