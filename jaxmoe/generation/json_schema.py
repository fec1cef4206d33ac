"""Text that is JSON of a schema: a `TokenConstraint` by the llguidance library, which the extra "constrain" installs."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmoe.generation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

Schema = Mapping[str, Any] | bool


class JsonSchemas:
    """Makes constraints for one tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: logits of the model, of which the last may have no token.
        eos_token_ids: tokens that end a text; at least one, for a text ends where its JSON is complete.

    Raises:
        ImportError: llguidance is not installed.
        ValueError: no token ends a text, or llguidance cannot read the tokenizer.

    Example:
        >>> tokenizer = Tokenizer.from_directory("demo")
        >>> constraint = JsonSchemas(tokenizer, 2048, frozenset({0})).constraint({"type": "boolean"})
        >>> sorted(tokenizer.decode([token]) for token in constraint.allowed().nonzero()[0])[:2]
        ['f', 't']
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]):
        require_llguidance()
        from llguidance import LLTokenizer

        if not eos_token_ids:
            raise ValueError(
                "text of a JSON schema ends with an EOS token, and there is none: the checkpoint names none, or ignore_eos "
                "is true; leave ignore_eos out"
            )
        self._eos, self._vocab_size = np.array(sorted(eos_token_ids)), vocab_size
        try:
            self._tokenizer = LLTokenizer(
                tokenizer.to_json(), n_vocab=max(vocab_size, tokenizer.vocab_size), eos_token=sorted(eos_token_ids)
            )
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"llguidance cannot constrain text of this tokenizer: {error}") from error
        self._compiled: dict[str, LLMatcher] = {}

    def constraint(self, schema: Schema) -> "JsonSchemaConstraint":
        """Make the constraint of one text.

        Raises:
            ValueError: the schema is not valid, or has a keyword that llguidance does not have.
        """
        from llguidance import LLMatcher

        text = json.dumps(schema)
        if text not in self._compiled:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=_WHITESPACE)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(
                    f"a JSON schema has keywords that llguidance knows; got {text:.80}: {matcher.get_error()}"
                )
            if len(self._compiled) >= _MOST_COMPILED:
                self._compiled.clear()
            self._compiled[text] = matcher
        return JsonSchemaConstraint(self._compiled[text].deep_copy(), self._eos, self._vocab_size)


class JsonSchemaConstraint:
    """The tokens that keep one text a beginning of JSON that the schema allows; EOS where it is complete, and only there.

    Args:
        matcher: state of the text, this object's own.
        eos: tokens that end a text.
        vocab_size: length of the masks.

    Attributes:
        error: reason why the text could not go on, where llguidance has met one of its limits or the tokenizer has no token
            for what has to come; the text ends there, and is no JSON. None where all is well.
    """

    def __init__(self, matcher: "LLMatcher", eos: np.ndarray, vocab_size: int):
        self._matcher, self._eos, self._vocab_size = matcher, eos, vocab_size
        self._ended = False
        self.error: str | None = None

    def allowed(self) -> np.ndarray:
        """Tokens that may come next, bool [V]."""
        mask = np.zeros(self._vocab_size, bool)
        if not (self._ended or self._matcher.is_stopped()):
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        # Every EOS token alike, whichever the library knows.
        mask[self._eos] = self._ended or self._matcher.is_accepting()
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
        elif not mask.any():
            self.error = "no token of the tokenizer can come next"
        if self.error is not None:
            mask[:] = False
            mask[self._eos] = True
        return mask

    def accept(self, token_id: int) -> None:
        """Take note of the token that was chosen."""
        if token_id in self._eos:
            self._ended = True
        elif not self._matcher.consume_token(token_id) and self.error is None:
            self.error = self._matcher.get_error() or f"token {token_id} was not allowed"


_MOST_COMPILED = 64
# Between two tokens of JSON nothing, a space, or a new line with its indent: models that may write any amount of space do
# not stop writing it. A schema that has "x-guidance" says otherwise.
_WHITESPACE: Any = {"whitespace_pattern": r"( |\n {0,32})?"}


def require_llguidance() -> None:
    """Refuse to go on without llguidance.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import llguidance  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f'JSON of a schema needs what the extra "constrain" installs: pip install "jaxmoe[constrain]" ({error})'
        ) from error


def schema_of(response_format: Any) -> Schema | None:
    """Read the API's ``response_format``: the schema that it stands for, None for any text.

    Raises:
        ValueError: it is none of the forms that there are.

    Example:
        >>> schema_of({"type": "json_object"})
        {'type': 'object'}
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        outer = response_format.get("json_schema")
        schema = outer.get("schema") if isinstance(outer, Mapping) else None
        if isinstance(schema, Mapping | bool):
            return schema
    raise ValueError(
        'response_format is {"type": "json_schema", "json_schema": {"schema": ...}}, {"type": "json_object"} or '
        f'{{"type": "text"}}; got {response_format!r:.80}'
    )
