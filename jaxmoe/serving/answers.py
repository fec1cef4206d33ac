"""Answers in the API's JSON, whole and in chunks."""

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxmoe.generation.detokenize import REPLACEMENT
from jaxmoe.generation.tool_calls import ToolCall
from jaxmoe.serving.service import Piece, TokenText


class Completion:
    """The answer to a completion.

    Args:
        model: name as the request has it.
    """

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str):
        self.id, self.created, self.model = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time()), model
        self._offsets: dict[int, int] = {}

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that every part of the answer has."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def first(self, index: int) -> list[dict[str, Any]]:
        """Choices of the chunk before the first token; none."""
        del index
        return []

    def delta(self, piece: Piece) -> dict[str, Any]:
        """One choice of a chunk."""
        offset = self._offsets.get(piece.choice, 0)
        self._offsets[piece.choice] = offset + len(piece.text)
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": self._logprobs([(piece, offset)]),
            "finish_reason": piece.finish_reason,
        }

    def choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """One whole choice."""
        offsets, offset = [], 0
        for piece in pieces:
            offsets.append(offset)
            offset += len(piece.text)
        return {
            "index": pieces[0].choice,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs([*zip(pieces, offsets, strict=True)]),
            "finish_reason": pieces[-1].finish_reason,
        }

    def _logprobs(self, pieces: list[tuple[Piece, int]]) -> dict[str, Any] | None:
        told = [(piece.token, piece.top, offset) for piece, offset in pieces if piece.token is not None]
        if not told:
            return None
        return {
            "tokens": [token.text for token, _, _ in told],
            "token_logprobs": [token.logprob for token, _, _ in told],
            "top_logprobs": [{one.text: one.logprob for one in (*top, token)} if top else {} for token, top, _ in told],
            "text_offset": [offset for _, _, offset in told],
        }


class ChatCompletion(Completion):
    """The answer to a chat."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str):
        super().__init__(model)
        self._calls: Counter[int] = Counter()  # of each choice, so far

    def first(self, index: int) -> list[dict[str, Any]]:
        """Choices of the chunk before the first token, which says who speaks."""
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ]

    def delta(self, piece: Piece) -> dict[str, Any]:
        """One choice of a chunk."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            first = self._calls[piece.choice]
            self._calls[piece.choice] += len(piece.calls)
            delta["tool_calls"] = [{"index": index, **_call(call)} for index, call in enumerate(piece.calls, first)]
        return {
            "index": piece.choice,
            "delta": delta,
            "logprobs": _content([piece]),
            "finish_reason": piece.finish_reason,
        }

    def choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """One whole choice."""
        text, calls = "".join(piece.text for piece in pieces), [_call(call) for piece in pieces for call in piece.calls]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": pieces[0].choice,
            "message": message,
            "logprobs": _content(pieces),
            "finish_reason": pieces[-1].finish_reason,
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Counts of tokens."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call._asdict()}


def _content(pieces: Sequence[Piece]) -> dict[str, Any] | None:
    told = [(piece.token, piece.top) for piece in pieces if piece.token is not None]
    if not told:
        return None
    return {"content": [{**_token(token), "top_logprobs": [_token(one) for one in top]} for token, top in told]}


def _token(token: TokenText) -> dict[str, Any]:
    # A token may be a part of a character, whose bytes its text does not have.
    raw = None if REPLACEMENT in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": token.logprob, "bytes": raw}
