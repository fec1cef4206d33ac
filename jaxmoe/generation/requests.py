"""Requests to continuous batching and their results: `Request`, `TokenResult`, `EngineCounts`."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxmoe.checks import instance_of, integer, real_number
from jaxmoe.generation.params import SamplingParams

FinishReason = Literal["length", "stop"]

# Most likely tokens that a request can ask for beside the chosen one: they come with every step, asked for or not.
MOST_LOGPROBS = 20


@runtime_checkable
class TokenConstraint(Protocol):
    """The tokens that may come next in one request, such as those that keep a JSON document valid.

    The engine asks `allowed` once before each token of the request and calls `accept` with the token that it chose. The
    object belongs to one request; it is never rewound.
    """

    def allowed(self) -> np.ndarray:
        """Tokens that may come next, bool [V]; at least one of them is True."""
        ...

    def accept(self, token_id: int) -> None:
        """Take note of the token that was chosen, which ends the request where it is one of its EOS tokens."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and everything that decides its output.

    Attributes:
        token_ids: the prompt's token ids, at least one.
        max_new_tokens: number of tokens after which it ends with reason "length", at least 1.
        params: settings by which tokens are chosen.
        seed: integer from 0 to 2**64 - 1 that decides what is left to chance; needed unless `params` are greedy.
        eos_token_ids: tokens at which it ends with reason "stop"; they stay in it.
        min_new_tokens: number of tokens before which no EOS token is chosen, at most `max_new_tokens`.
        logit_bias: numbers that are added to the logits of tokens, by token id, before anything else acts on them;
            -inf bans a token.
        logprobs: number of likeliest tokens whose log-probabilities come with every token, 0 for the chosen one's alone;
            None for none. They are of the model's own distribution: float32 log-softmax of its logits before bias,
            penalty, temperature and truncation.
        adapter: name of an adapter that the model holds; None for the model as it is.
        constraint: tokens that may come next; None for all. The next step of the whole batch waits for the token of such
            a request, so they cost speed.

    Raises:
        ValueError: a value is outside its range.
        TypeError: `params`, `logit_bias` or `constraint` is something else.

    Example:
        >>> Request(token_ids=[5, 6, 7], max_new_tokens=4, min_new_tokens=2).params.greedy
        True
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    seed: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    logprobs: int | None = None
    adapter: str | None = None
    constraint: TokenConstraint | None = None

    def __post_init__(self) -> None:
        token_ids = tuple(integer("token_ids", token, least=0) for token in self.token_ids)
        if not token_ids:
            raise ValueError("a prompt has at least one token; got token_ids without any")
        self._set("token_ids", token_ids)
        self._set("max_new_tokens", integer("max_new_tokens", self.max_new_tokens, least=1))
        self._set("min_new_tokens", integer("min_new_tokens", self.min_new_tokens, least=0, most=self.max_new_tokens))
        instance_of("params", self.params, SamplingParams, "a jaxmoe.SamplingParams")
        if self.seed is not None:
            self._set("seed", integer("seed", self.seed, least=0, most=2**64 - 1))
        elif not self.params.greedy:
            raise ValueError(
                f"a request with temperature {self.params.temperature} has a seed, an integer that decides what is left to "
                "chance; got seed=None"
            )
        self._set("eos_token_ids", frozenset(integer("eos_token_ids", one, least=0) for one in self.eos_token_ids))
        self._set("logit_bias", _bias(self.logit_bias))
        if self.logprobs is not None:
            self._set("logprobs", integer("logprobs", self.logprobs, least=0, most=MOST_LOGPROBS))
        if self.adapter is not None:
            instance_of("adapter", self.adapter, str, "the name of an adapter, or None")
        if self.constraint is not None:
            instance_of("constraint", self.constraint, TokenConstraint, "an object with allowed() and accept(token_id)")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _bias(bias: Any) -> Mapping[int, float]:
    instance_of("logit_bias", bias, Mapping, "a mapping of token ids to numbers")
    checked = {}
    for token, value in bias.items():
        minus_infinity = isinstance(value, float | np.floating) and value == -np.inf
        number = -np.inf if minus_infinity else real_number("logit_bias", value, note=", or -inf to ban a token")
        checked[integer("a token of logit_bias", token, least=0)] = float(number)
    return MappingProxyType(checked)


class TokenResult(NamedTuple):
    """One token of one request.

    Attributes:
        request_id: number that `ContinuousEngine.submit` gave.
        token_id: the token.
        logprob: its log-probability; None unless the request asked for it.
        top_logprobs: likeliest tokens and their log-probabilities, likeliest first, as many as the request asked for; None
            unless it asked.
        finish_reason: "stop" at an EOS token, "length" at max_new_tokens; None while the request goes on. Stop strings are
            text, which the engine does not know: who looks for them cancels the request.
    """

    request_id: int
    token_id: int
    logprob: float | None
    top_logprobs: list[tuple[int, float]] | None
    finish_reason: FinishReason | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineCounts:
    """Counts of a `ContinuousEngine`: what it holds at this moment, then what it has done since it was made.

    Attributes:
        waiting: requests that have no slot yet, preempted ones among them.
        running: requests that have one.
        slots: rows of the compiled programs.
        pages_in_use: pages that running requests hold, each counted once however many share it.
        pages_cached: pages that nobody holds, kept for prompts that begin in the same way; they give way when pages run out.
        pages: pages there are.
        prompt_tokens: tokens of the prompts that were submitted.
        cached_tokens: tokens among those to be prefilled that were found in pages of earlier requests instead.
        generated_tokens: tokens handed out.
        preemptions: times that a request gave back its slot and pages, to be computed again later.
        steps: programs of the model that were run, prefill chunks and decode steps alike.
    """

    waiting: int = 0
    running: int = 0
    slots: int = 0
    pages_in_use: int = 0
    pages_cached: int = 0
    pages: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
