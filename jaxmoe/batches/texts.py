"""Lines become requests, and tokens become the lines of the output."""

import dataclasses
import hashlib
from typing import Any

from jaxmoe.batches.lines import Line
from jaxmoe.generation.api import encode
from jaxmoe.generation.arguments import eos_token_ids_for, text_streams, tokenizer_for
from jaxmoe.generation.detokenize import TextStream
from jaxmoe.generation.json_schema import JsonSchemaConstraint, JsonSchemas
from jaxmoe.generation.model import Outline
from jaxmoe.generation.requests import FinishReason, Request, TokenResult
from jaxmoe.generation.tokenizer import Tokenizer


class Encoder:
    """Makes the requests of lines for one model.

    Args:
        outline: config and source of the model, known before a weight is read.
        tokenizer: tokenizer in place of the checkpoint's.
        adapters: names of adapters that the model holds.
    """

    def __init__(self, outline: Outline, tokenizer: Tokenizer | None = None, adapters: tuple[str, ...] = ()):
        self._outline, self._given, self._adapters = outline, tokenizer, adapters
        self._eos = eos_token_ids_for(outline, None)
        self._schemas: JsonSchemas | None = None

    def requests(self, line: Line, run_seed: int, number: int) -> "list[Sample]":
        """One request for each text that the line asks for.

        Args:
            line: the line.
            run_seed: seed of the run, for lines without one of their own.
            number: number of the line.

        Raises:
            ValueError: the model cannot take it.
            FileNotFoundError: it has text, and there is no tokenizer.
            ImportError: it has a JSON schema, and llguidance is not installed.
        """
        settings = line.settings
        variables = {**settings.chat_template_kwargs, **({} if line.tools is None else {"tools": line.tools})}
        token_ids = encode(
            self._outline,
            [line.prompt],
            max_new_tokens=settings.max_new_tokens,
            chat_template_kwargs=variables,
            tokenizer=self._given,
        )[0]
        streams = text_streams(settings.n, self._outline, self._given, settings.stop)
        first = _seed(run_seed, number) if settings.seed is None else settings.seed
        adapter = self._adapter(line)
        return [
            Sample(
                request=Request(
                    token_ids=token_ids,
                    max_new_tokens=settings.max_new_tokens,
                    params=settings.params,
                    seed=(first + index) % 2**64,
                    eos_token_ids=frozenset() if settings.ignore_eos else self._eos,
                    min_new_tokens=settings.min_new_tokens,
                    logit_bias=settings.logit_bias,
                    logprobs=settings.logprobs,
                    adapter=adapter,
                    constraint=None if settings.schema is None else self._constraint(settings.schema),
                ),
                stream=None if streams is None else streams[index],
            )
            for index in range(settings.n)
        ]

    def value(self, samples: "list[Sample]", *, token_ids: bool) -> dict[str, Any]:
        """Value of the output of a line whose texts have ended."""
        for sample in samples:
            constraint = sample.request.constraint
            if isinstance(constraint, JsonSchemaConstraint) and constraint.error is not None:
                return {"error": {"message": f"llguidance gave up on the JSON schema: {constraint.error}"}}
        usage = {
            "prompt_tokens": len(samples[0].request.token_ids),
            "completion_tokens": sum(len(sample.token_ids) for sample in samples),
        }
        outputs = [self._output(sample, index, token_ids=token_ids) for index, sample in enumerate(samples)]
        return {"outputs": outputs, "usage": usage}

    def _output(self, sample: "Sample", index: int, *, token_ids: bool) -> dict[str, Any]:
        request = sample.request
        found: dict[str, Any] = {"index": index}
        if sample.stream is not None:
            found["text"] = sample.stream.text
        if token_ids or sample.stream is None:
            found["token_ids"] = sample.token_ids
        found["finish_reason"] = sample.finish_reason
        if not request.params.greedy:
            found["seed"] = request.seed
        if request.logprobs is not None:
            found["logprobs"] = [self._logprobs(result) for result in sample.told]
        return found

    def _adapter(self, line: Line) -> str | None:
        chosen = line.settings.adapter
        if chosen is not None and chosen not in self._adapters:
            raise ValueError(
                f"adapter is one that the model holds ({', '.join(self._adapters) or 'none'}); got {chosen!r}"
            )
        if line.model is None or line.model == chosen:
            return chosen
        own = None if self._outline.source is None else self._outline.source.resolve().name
        if line.model in self._adapters and chosen is None:
            return line.model
        if line.model != own:
            held = ", ".join(self._adapters) or "none"
            raise ValueError(
                f"model is the checkpoint's name ({own}) or an adapter's ({held}), the same as in adapter where both are "
                f"given; got {line.model!r}: leave it out"
            )
        return chosen

    def _constraint(self, schema: Any) -> Any:
        if self._schemas is None:
            tokenizer = tokenizer_for(self._outline, self._given)
            self._schemas = JsonSchemas(tokenizer, self._outline.config.vocab_size, self._eos)
        return self._schemas.constraint(schema)

    def _logprobs(self, result: TokenResult) -> dict[str, Any]:
        assert result.logprob is not None
        top = [self._token(token, logprob) for token, logprob in result.top_logprobs or ()]
        return {**self._token(result.token_id, result.logprob), **({"top": top} if top else {})}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        try:
            tokenizer = tokenizer_for(self._outline, self._given)
        except (FileNotFoundError, ValueError):
            return {"token_id": token_id, "logprob": logprob}
        text = tokenizer.special_tokens.get(token_id) or tokenizer.decode([token_id])
        return {"token_id": token_id, "token": text, "logprob": logprob}


@dataclasses.dataclass
class Sample:
    """One text of a line, as it grows."""

    request: Request
    stream: TextStream | None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    told: list[TokenResult] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, result: TokenResult) -> bool:
        """Add a token.

        Returns:
            Whether the text ends with it and the engine does not know: at a stop string.
        """
        self.token_ids.append(result.token_id)
        if self.request.logprobs is not None:
            self.told.append(result)
        self.finish_reason = result.finish_reason
        if self.stream is not None:
            _, self.finish_reason = self.stream.take(result.token_id, result.finish_reason)
        return self.finish_reason is not None and result.finish_reason is None


def _seed(run_seed: int, number: int) -> int:
    """Seed of a line that has none: of the run and its number, so that a restart finds it again."""
    return int.from_bytes(hashlib.sha256(f"{run_seed} {number}".encode()).digest()[:8])
