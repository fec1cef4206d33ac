"""Fields that requests in JSON have in common, of a server and of a line in a file: their checks."""

from typing import Any

from jaxmoe.checks import real_number


def read_stop(name: str, value: Any, *, most: int | None = None) -> list[str]:
    """Stop strings, given as one text or as a list of up to `most`.

    Raises:
        ValueError: it is something else, or one of them is empty.
    """
    texts = [value] if isinstance(value, str) else value
    fits = isinstance(texts, list) and (most is None or len(texts) <= most)
    if not fits or not all(isinstance(text, str) and text for text in texts):
        several = "them" if most is None else f"up to {most}"
        raise ValueError(f"{name} is a text or a list of {several}, none of them empty; got {value!r:.80}")
    return texts


def read_logit_bias(
    name: str, value: Any, *, least: float | None = None, most: float | None = None
) -> dict[int, float]:
    """Numbers from `least` to `most` that are added to logits, by token id; the ids are texts in JSON.

    Raises:
        ValueError: it is no object of such ids, or a number is none or outside of these.
    """
    if not isinstance(value, dict) or not all(token.isdecimal() for token in value):
        raise ValueError(f'{name} is an object of token ids and numbers, as {{"5": -100}}; got {value!r:.80}')
    return {int(token): real_number(name, number, least=least, most=most) for token, number in value.items()}
