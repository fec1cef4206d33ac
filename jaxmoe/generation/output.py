"""What generation hands out: `Output` at the end, `TokenEvent` on the way."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The text generated for one prompt.

    Attributes:
        prompt_token_ids: what the model was given, special tokens included.
        token_ids: the generated part only. It keeps the EOS token that ended it, and the
            tokens of a stop string.
        text: `token_ids` as text without special tokens, cut before a stop string; None where
            the checkpoint has no tokenizer.
        finish_reason: "stop" for an EOS token or a stop string, "length" for max_new_tokens.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: Literal["length", "stop"]


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One generated token, as `stream` callbacks get it.

    Attributes:
        index: which prompt.
        token_id: the token.
        text: the text that became certain with it: "" in the middle of a character or of what may be
            a stop string. The pieces of a prompt joined are its `Output.text`. None without a tokenizer.
        finish_reason: None until the prompt's last event.
    """

    index: int
    token_id: int
    text: str | None
    finish_reason: Literal["length", "stop"] | None = None
