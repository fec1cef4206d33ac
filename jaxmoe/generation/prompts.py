"""Prompts as a caller passes them become checked lists of token ids."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxmoe.checks import integer
from jaxmoe.generation.tokenizer import Tokenizer

TokenIds = Sequence[int]
Conversation = Sequence[Mapping[str, Any]]
Prompt = str | TokenIds | Conversation


def encode_prompts(
    prompts: str | Iterable[Prompt],
    tokenizer: Callable[[], Tokenizer],
    *,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Encode every prompt to token ids.

    Args:
        prompts: prompts, all of them texts, lists of token ids or conversations (lists of messages);
            one text alone counts as a list of it.
        tokenizer: function that gives the tokenizer; called if there is text to encode.
        chat: whether a text is the user's message in a conversation, and not text to go on with.
        chat_template_kwargs: further variables for the chat template.

    Raises:
        ValueError: no prompt, an empty one, one of none of the three kinds, or prompts of different kinds.
        FileNotFoundError: text without a tokenizer.
    """
    if isinstance(prompts, Mapping):  # a list of it would be its keys
        raise ValueError(f"prompts is a list; got a dictionary: for one conversation write [[{_brief(prompts)}]]")
    given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise ValueError("prompts has at least one prompt; got an empty list")
    kinds = [_kind(prompt, index) for index, prompt in enumerate(given)]
    if len(set(kinds)) > 1:
        other = next(index for index, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(
            f"prompts are all of one kind: prompt 0 is {kinds[0]} and prompt {other} is {kinds[other]}; "
            f"call once for each kind"
        )
    if kinds[0] == _IDS:
        if chat:
            raise ValueError("chat=True is for text prompts and these are token ids; apply the chat template first")
        return [[operator.index(token) for token in prompt] for prompt in given]

    encoder = tokenizer()
    if kinds[0] == _TEXT and chat:
        given = [[{"role": "user", "content": prompt}] for prompt in given]
    if kinds[0] == _CONVERSATION or chat:
        texts = [encoder.apply_chat_template(messages, **(chat_template_kwargs or {})) for messages in given]
        return [encoder.encode(text, add_special_tokens=False) for text in texts]
    return [encoder.encode(prompt) for prompt in given]


def check_prompts(
    prompts: Sequence[TokenIds], *, vocab_size: int, max_new_tokens: int, max_position_embeddings: int
) -> None:
    """Refuse prompts that the model cannot take.

    Raises:
        ValueError: a prompt without tokens, an id outside the vocabulary, or more positions
            needed than the model has.
    """
    integer("max_new_tokens", max_new_tokens, least=1)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"a prompt has at least one token; prompt {index} is empty")
        outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise ValueError(
                f"token ids are 0 to {vocab_size - 1} (vocab_size {vocab_size}); prompt {index} has {outside}"
            )
        if len(prompt) + max_new_tokens > max_position_embeddings:
            room = max_position_embeddings - len(prompt)
            way_out = f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt"
            raise ValueError(
                f"prompt plus new tokens fit the model's max_position_embeddings ({max_position_embeddings}): "
                f"prompt {index} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}; {way_out}"
            )


_TEXT, _IDS, _CONVERSATION = "text", "token ids", "a conversation"


def _kind(prompt: Any, index: int) -> str:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"a prompt has at least one character; prompt {index} is empty")
        return _TEXT
    if _is_integer(prompt):
        raise ValueError(
            f"a prompt of token ids is a list of int, and prompts a list of those: prompt {index} is the number "
            f"{prompt}; for one prompt write [[5, 6, 7]]"
        )
    try:
        items = list(prompt)
    except TypeError:
        items = [None]
    if not items:
        raise ValueError(f"a prompt has at least one token; prompt {index} is empty")
    if all(map(_is_integer, items)):
        return _IDS
    if all(isinstance(item, Mapping) for item in items):
        return _CONVERSATION
    raise ValueError(
        f"a prompt is a text, a list of token ids or a list of chat messages; prompt {index} is {_brief(prompt)}"
    )


def _is_integer(value: Any) -> bool:
    # Whatever counts as an index is a token id: int, NumPy integers, elements of integer arrays. A bool is a mistake.
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
