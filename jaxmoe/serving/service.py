"""The model behind a server: prompts become requests to the engine, and tokens become text."""

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxmoe.generation.async_engine import AsyncEngine, EngineStoppedError
from jaxmoe.generation.detokenize import TextStream
from jaxmoe.generation.json_schema import JsonSchemaConstraint, JsonSchemas
from jaxmoe.generation.requests import FinishReason, Request, TokenConstraint, TokenResult
from jaxmoe.generation.tokenizer import Tokenizer
from jaxmoe.generation.tool_calls import BEGIN, FORMS, CallForm, CallReader, ToolCall, form_of
from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.fields import Asked
from jaxmoe.serving.metrics import Metrics


class TokenText(NamedTuple):
    """A token as text, with its log-probability."""

    text: str
    logprob: float


class Piece(NamedTuple):
    """An addition of one token to a choice.

    Attributes:
        choice: number of the choice.
        text: text that became certain with it.
        token: the token and its log-probability; None unless asked for.
        top: likeliest tokens in its place; empty unless asked for.
        finish_reason: reason of the end; None while the choice goes on.
        calls: calls of tools that became certain with it.
    """

    choice: int
    text: str
    token: TokenText | None
    top: list[TokenText]
    finish_reason: FinishReason | Literal["tool_calls"] | None
    calls: Sequence[ToolCall] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what clients may ask for.

    Attributes:
        body_bytes: largest body of a request.
        body_seconds: time in which a body has to come.
        queue: requests that wait beside those that run; further ones are refused with 429.
        max_length: most tokens of a prompt and its text together.
    """

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    queue: int = 256
    max_length: int


class Service:
    """One model behind the API.

    Args:
        engine: engine that runs.
        tokenizer: tokenizer of the model.
        names: names of models that clients may ask for: the model's own first, then its adapters', each with the adapter
            that it stands for.
        eos_token_ids: tokens that end a text.
        limits: bounds on what clients may ask for.
        metrics: counts for Prometheus.
        vocab_size: logits of the model.

    Attributes:
        draining: whether new requests are refused, because the server is about to end.
        created: time of the start, in seconds of Unix.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        *,
        names: dict[str, str | None],
        eos_token_ids: frozenset[int],
        limits: Limits,
        metrics: Metrics,
        vocab_size: int,
    ):
        self.engine, self.tokenizer, self.names = engine, tokenizer, names
        self.eos_token_ids, self.limits, self.metrics = eos_token_ids, limits, metrics
        self.vocab_size = vocab_size
        self._schemas: JsonSchemas | None = None  # made when one is first asked for
        self.draining = False
        self.created = int(time.time())

    def encode_texts(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Token ids of a completion's prompts.

        Raises:
            ApiError: one has no tokens.
        """
        token_ids = [self.tokenizer.encode(one) if isinstance(one, str) else one for one in prompts]
        if not all(token_ids):
            raise ApiError(400, "a prompt has at least one token; an empty text has none", param="prompt")
        return token_ids

    def encode_chat(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> list[int]:
        """Token ids of a conversation.

        Raises:
            ApiError: there is no chat template, or it refuses the messages.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, **variables)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def call_form(self, variables: Mapping[str, Any]) -> CallForm | None:
        """Find the form in which calls of tools are to be read; None where a chat has no tools.

        Args:
            variables: variables of the chat template, tools among them.

        Raises:
            ApiError: the chat template asks for no form that is known here.
        """
        templates = self.tokenizer.chat_templates
        if "tools" not in variables or templates is None:
            return None
        form = form_of(templates.choose(variables.get("chat_template"), variables["tools"]).source)
        if form is None or BEGIN in self.tokenizer.special_tokens.values():
            known = ", ".join(form.name for form in FORMS)
            raise ApiError(
                400,
                f"tools are called between {BEGIN} tags, as {known}, and this model's chat template asks for none of these: "
                "its calls would come as text; leave tools out, or describe them in a message of your own",
                param="tools",
                code="unsupported_value",
            )
        return form

    def constraints(self, asked: Asked) -> list[TokenConstraint | None]:
        """Make the constraint of each choice, which takes a while for a schema that is new.

        Raises:
            ApiError: the schema is not valid, or constraints are not to be had.
        """
        if asked.schema is None:
            return [None] * asked.n
        schema = asked.schema
        try:
            if self._schemas is None:
                self._schemas = JsonSchemas(self.tokenizer, self.vocab_size, self.eos_token_ids)
            schemas = self._schemas
            return [schemas.constraint(schema) for _ in range(asked.n)]
        except (ValueError, ImportError) as error:
            raise ApiError(400, str(error), param="response_format") from error

    def requests(
        self, prompts: list[list[int]], asked: Asked, constraints: Sequence[TokenConstraint | None] = ()
    ) -> list[Request]:
        """One request for each choice of each prompt, prompt by prompt; `constraints` are those of one prompt's choices.

        Raises:
            ApiError: there is no such model, a prompt is too long, or the queue is full.
        """
        if asked.model not in self.names:
            raise ApiError(
                404,
                f"there is no model {asked.model!r}; /v1/models lists {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        seed = secrets.randbits(64) if asked.seed is None else asked.seed
        requests = [
            self._request(prompt, asked, (seed + choice) % 2**64, constraints[choice] if constraints else None)
            for prompt in prompts
            for choice in range(asked.n)
        ]
        self._check_queue(len(requests))
        return requests

    def _request(self, prompt: list[int], asked: Asked, seed: int, constraint: TokenConstraint | None) -> Request:
        max_tokens = self._max_tokens(len(prompt), asked)
        if asked.min_tokens > max_tokens:
            raise ApiError(
                400, f"min_tokens is at most the {max_tokens} of max_tokens; got {asked.min_tokens}", param="min_tokens"
            )
        try:
            return Request(
                token_ids=prompt,
                max_new_tokens=max_tokens,
                params=asked.params,
                seed=seed,
                eos_token_ids=frozenset() if asked.ignore_eos else self.eos_token_ids,
                min_new_tokens=asked.min_tokens,
                logit_bias=asked.logit_bias,
                logprobs=asked.logprobs,
                adapter=self.names[asked.model],
                constraint=constraint,
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    def _max_tokens(self, prompt: int, asked: Asked) -> int:
        limit = self.limits.max_length
        room = limit - prompt
        if room < 1 or (asked.max_tokens or 0) > room:
            wanted = "at least one more" if asked.max_tokens is None else f"{asked.max_tokens} more"
            raise ApiError(
                400,
                f"a prompt and its text have at most {limit} tokens together; the prompt has {prompt}, and {wanted} is "
                f"asked for; {f'ask for at most {room}' if room > 0 else 'shorten the prompt'}",
                param="max_tokens" if room > 0 else None,
                code="context_length_exceeded",
            )
        return asked.max_tokens or room

    def _check_queue(self, count: int) -> None:
        if self.draining:
            raise ApiError(503, "the server is about to end; ask another, or later", headers={"Retry-After": "5"})
        room = self.engine.counts.slots + self.limits.queue
        if count > room:
            raise ApiError(400, f"a request has at most {room} choices over all prompts; got {count}", param="n")
        if self.engine.unfinished + count > room:
            raise ApiError(
                429,
                f"{self.engine.unfinished} requests run or wait already, and there is room for {room}; try again later",
                code="queue_full",
                headers={"Retry-After": str(self.metrics.seconds_until_free())},
            )

    async def pieces(
        self, requests: list[Request], asked: Asked, read_calls: Callable[[], CallReader] | None = None
    ) -> AsyncIterator[Piece]:
        """Run requests, and give the text of all choices as it comes; leaving the loop cancels what is left.

        Args:
            requests: requests of the choices.
            asked: fields that they come from.
            read_calls: function that makes a reader of the calls in a choice; None for text alone.

        Raises:
            ApiError: the engine refuses a request, or has ended.
        """
        texts = [
            TextStream(self.tokenizer.decode, asked.stop, self.tokenizer.special_tokens) for _ in range(len(requests))
        ]
        readers = None if read_calls is None else [read_calls() for _ in requests]
        watches = [self.metrics.watch() for _ in requests]
        try:
            async with await self.engine.submit(requests) as tokens:
                async for index, result in tokens:
                    text, reason = texts[index].take(result.token_id, result.finish_reason)
                    watches[index].token()
                    if reason is not None:
                        tokens.cancel(index)  # where a stop string ended it, the engine does not know
                        watches[index].end(reason)
                        _check_json(requests[index])
                    piece = Piece(index, text, *self._logprobs(result), reason)
                    yield piece if readers is None else _with_calls(piece, readers[index])
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except EngineStoppedError as error:
            raise ApiError(503, str(error), headers={"Retry-After": "30"}) from error
        finally:
            for watch in watches:
                watch.end("canceled")

    def _logprobs(self, result: TokenResult) -> tuple[TokenText | None, list[TokenText]]:
        if result.logprob is None:
            return None, []
        top = [TokenText(self.token_text(token), logprob) for token, logprob in result.top_logprobs or ()]
        return TokenText(self.token_text(result.token_id), result.logprob), top

    def token_text(self, token_id: int) -> str:
        """Text of one token, special ones too."""
        return self.tokenizer.special_tokens.get(token_id) or self.tokenizer.decode([token_id])


def _with_calls(piece: Piece, reader: CallReader) -> Piece:
    """The same with the calls taken out of the text."""
    text, calls = reader.push(piece.text)
    reason = piece.finish_reason
    if reason is not None:
        text += reader.finish()
    if reason == "stop" and reader.calls:
        reason = "tool_calls"
    return piece._replace(text=text, calls=calls, finish_reason=reason)


def _check_json(request: Request) -> None:
    constraint = request.constraint
    if isinstance(constraint, JsonSchemaConstraint) and constraint.error is not None:
        raise ApiError(500, f"the text could not go on as JSON of its schema: {constraint.error}")
