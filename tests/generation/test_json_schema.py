"""Text of a JSON schema: whatever is chosen of what is allowed, the text is valid, and ends where it is complete."""

import json
import sys

import jsonschema
import numpy as np
import pytest

from jaxmoe.generation import Request, TokenConstraint, Tokenizer
from jaxmoe.generation.json_schema import JsonSchemas, schema_of
from tests.support import runs
from tests.support.tokenizers import byte_fallback, byte_level

SCHEMAS = [
    {"type": "boolean"},
    {"enum": ["héé", "a", 3, None]},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 3},
            "tags": {"type": "array", "items": {"enum": ["a", "he"]}, "maxItems": 3},
            "at": {"type": "integer", "minimum": 1, "maximum": 20},
        },
        "required": ["name", "at"],
        "additionalProperties": False,
    },
    {"anyOf": [{"type": "null"}, {"type": "array", "prefixItems": [{"const": 1}], "items": False, "minItems": 1}]},
]
PADDING = 5  # logits beyond the tokenizer's


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request) -> Tokenizer:
    return Tokenizer(request.param())


def schemas_of(tokenizer: Tokenizer, *ends: str) -> tuple[JsonSchemas, frozenset[int]]:
    eos = frozenset(token for token, text in tokenizer.special_tokens.items() if text in (ends or ("<|end|>",)))
    return JsonSchemas(tokenizer, tokenizer.vocab_size + PADDING, eos), eos


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_any_choice_gives_a_valid_text(tokenizer, schema) -> None:
    schemas, eos = schemas_of(tokenizer)
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(runs.examples(6, 60)):
        constraint, tokens = schemas.constraint(schema), []
        while True:
            allowed = constraint.allowed()
            assert allowed.shape == (tokenizer.vocab_size + PADDING,)
            assert not allowed[tokenizer.vocab_size :].any()
            token = int(random.choice(allowed.nonzero()[0]))
            complete = _is_valid(tokenizer.decode(tokens), schema)
            assert complete or not any(allowed[end] for end in eos), "EOS before the text is complete"
            constraint.accept(token)
            if token in eos:
                break
            assert token not in tokenizer.special_tokens
            tokens.append(token)
            assert len(tokens) < 2000
        assert constraint.error is None
        text = tokenizer.decode(tokens)
        jsonschema.validate(json.loads(text), schema)
        seen.add(text)
    assert len(seen) > 1


def _is_valid(text: str, schema: dict) -> bool:
    try:
        return jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    except ValueError:
        return False


def test_every_eos_token_ends_a_complete_text(tokenizer) -> None:
    schemas, eos = schemas_of(tokenizer, "<|start|>", "<|end|>")
    assert len(eos) == 2
    constraint = schemas.constraint({"const": 1})
    assert isinstance(constraint, TokenConstraint)
    Request(token_ids=[1], max_new_tokens=1, constraint=constraint)
    (one,) = constraint.allowed().nonzero()[0][:1]
    constraint.accept(int(one))
    while not constraint.allowed()[min(eos)]:
        constraint.accept(int(constraint.allowed().nonzero()[0][0]))
    assert all(constraint.allowed()[end] for end in eos)
    constraint.accept(max(eos))
    assert set(constraint.allowed().nonzero()[0]) == set(eos)


def test_texts_of_one_schema_are_apart(tokenizer) -> None:
    schemas, _ = schemas_of(tokenizer)
    first, second = schemas.constraint({"type": "boolean"}), schemas.constraint({"type": "boolean"})
    before = second.allowed()
    first.accept(int(before.nonzero()[0][0]))
    assert (second.allowed() == before).all()
    assert (first.allowed() != before).any()


def test_what_is_refused(tokenizer, monkeypatch) -> None:
    schemas, _ = schemas_of(tokenizer)
    for schema in ({"type": "objekt"}, {"type": "array", "uniqueItems": True}):
        with pytest.raises(ValueError, match="a JSON schema has keywords that llguidance knows; got "):
            schemas.constraint(schema)
    with pytest.raises(ValueError, match="ends with an EOS token, and there is none"):
        JsonSchemas(tokenizer, tokenizer.vocab_size, frozenset())
    for form in (
        {"type": "json_schema"},
        {"type": "xml"},
        "json",
        {"type": "json_schema", "json_schema": {"schema": 1}},
    ):
        with pytest.raises(ValueError, match="response_format is "):
            schema_of(form)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r'pip install "jaxmoe\[constrain\]"'):
        schemas_of(tokenizer)


def test_a_text_that_cannot_go_on_ends_with_an_error() -> None:
    """A token outside of what was allowed, as a bug of the engine would choose it."""
    tokenizer = Tokenizer(byte_level())
    schemas, eos = schemas_of(tokenizer)
    constraint = schemas.constraint({"type": "boolean"})
    constraint.accept(tokenizer.encode("{")[0])
    assert constraint.error
    assert set(constraint.allowed().nonzero()[0]) == set(eos)
