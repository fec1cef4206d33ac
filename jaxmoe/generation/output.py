"""Results of a generation: `Output` at the end, `TokenEvent` on the way."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The text generated for one prompt.

    Attributes:
        prompt_token_ids: tokens that the model was given, special tokens included.
        token_ids: tokens that were generated. The EOS token that ended them is kept, and so are the
            tokens of a stop string.
        text: `token_ids` as text without special tokens, cut before a stop string; None where
            the checkpoint has no tokenizer.
        finish_reason: reason of the end, "stop" for an EOS token or a stop string, "length" for max_new_tokens.
        adapter: name of the adapter that the prompt has chosen; None for the model as it is.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: Literal["length", "stop"]
    adapter: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """A generated token, as `stream` callbacks get it.

    Attributes:
        index: number of the prompt.
        token_id: token that was generated.
        text: the text that became certain with it: "" in the middle of a character or of what may be
            a stop string. The pieces of a prompt joined are its `Output.text`. None without a tokenizer.
        finish_reason: reason of the end; None until the prompt's last event.
    """

    index: int
    token_id: int
    text: str | None
    finish_reason: Literal["length", "stop"] | None = None
