"""Arguments that `generate` and `stream` share, checked and completed."""

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.checks import integer
from jaxmoe.generation.detokenize import TextStream
from jaxmoe.generation.eos import eos_token_ids as read_eos_token_ids
from jaxmoe.generation.model import Outline
from jaxmoe.generation.tokenizer import Tokenizer, tokenizer_of


def tokenizer_for(model: Outline, given: Tokenizer | None) -> Tokenizer:
    """The tokenizer that was given, or else the checkpoint's."""
    if given is not None:
        return given
    if model.source is None:
        raise ValueError(
            "text needs a tokenizer, and this model comes from no checkpoint directory: pass token ids or tokenizer="
        )
    return tokenizer_of(model.source)


def text_streams(
    count: int, model: Outline, tokenizer: Tokenizer | None, stop: Sequence[str]
) -> list[TextStream] | None:
    """One stream per prompt; None without a tokenizer, which only stop strings insist on."""
    if tokenizer is None and model.source is None and not stop:
        return None
    try:
        tokenizer = tokenizer_for(model, tokenizer)
    except FileNotFoundError:
        # No tokenizer is fine for token ids; a broken one is an error.
        if stop:
            raise
        return None
    return [TextStream(tokenizer.decode, stop, tokenizer.special_tokens) for _ in range(count)]


def stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """Stop strings as a list."""
    stop = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"a stop string is a text of at least one character; got {stop!r}")
    return stop


def seeds_for(seed: Any, count: int) -> list[int]:
    """A seed for each prompt; fresh ones where none is given."""
    if seed is None:
        return [secrets.randbits(64) for _ in range(count)]
    seeds = [seed] * count if isinstance(seed, str) or np.ndim(seed) == 0 else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed is one int or one for each prompt: got {len(seeds)} seeds for {count} prompts")
    return [integer("seed", one, least=0, most=2**64 - 1) for one in seeds]


def eos_token_ids_for(model: Outline, given: frozenset[int] | None) -> frozenset[int]:
    """The tokens that end a text: those that were given, or else those that the checkpoint names."""
    if given is not None:
        return given
    if model.source is None:
        return frozenset()
    return read_eos_token_ids(model.source)
