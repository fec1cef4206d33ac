"""Stop strings that are special tokens, hold one or are a part of one, though the text shows none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RustTokenizer

import jaxmoe
from jaxmoe.generation import Tokenizer
from jaxmoe.generation.detokenize import StopStrings, TextStream
from tests.support.fake_model import VOCAB, FakeModel, expected
from tests.support.meshes import mesh_of
from tests.support.tokenizers import byte_level, save

RUST = byte_level()
TOKENIZER = Tokenizer(byte_level())
START, END = (RUST.token_to_id(token) for token in ("<|start|>", "<|end|>"))


def ids_of(*parts: str | int) -> list[int]:
    """Token ids of texts and of token ids between them."""
    encoded = ([part] if isinstance(part, int) else RUST.encode(part, add_special_tokens=False).ids for part in parts)
    return [token for ids in encoded for token in ids]


def first_stop(ids: list[int], stops: list[str]) -> tuple[int | None, str]:
    """Tokens read until a stop string was found (None for never), and the text shown."""
    stream = TextStream(TOKENIZER.decode, stops, TOKENIZER.special_tokens)
    for count, token in enumerate(ids, 1):
        stream.push(token)
        if stream.stopped:
            return count, stream.text
    stream.finish()
    return None, stream.text


@pytest.mark.parametrize(
    ("stops", "count", "shown"),
    [
        (["<|end|>"], 3, "ab"),
        (["b<|end|>"], 3, "a"),
        (["<|end|>c"], 4, "ab"),
        (["|end"], 3, "ab"),
        (["<|start|>"], None, "abcd"),
        (["bc"], None, "abcd"),  # a special token stands between them
        ([], None, "abcd"),
    ],
)
def test_a_special_token_is_searched_and_not_shown(stops, count, shown) -> None:
    assert first_stop(ids_of("ab", END, "cd"), stops) == (count, shown)


@given(
    st.lists(st.tuples(st.text("ab", max_size=4), st.booleans()), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_hidden_text_is_searched_like_the_rest(pieces, stops) -> None:
    stop = StopStrings(stops)
    shown = "".join([*(stop.push(text, hidden=hidden) for text, hidden in pieces), stop.finish()])
    whole = "".join(text for text, _ in pieces)
    hidden = [flag for text, flag in pieces for _ in text]
    # Piece by piece the first match to be complete wins; it begins where the earliest of those in that piece does.
    ends, read = [], 0
    for text, _ in pieces:
        read += len(text)
        ends = [whole[:read].find(one) for one in stops if one in whole[:read]]
        if ends:
            break
    cut = min(ends) if ends else len(whole)
    assert stop.found == bool(ends)
    assert shown == "".join(c for c, flag in zip(whole[:cut], hidden, strict=False) if not flag)


def test_generation_stops_there() -> None:
    full = expected([0, 1, 2], 12)
    special = full[3]
    assert special not in full[:3]
    names = ["<|stop|>" if token == special else chr(ord("A") + token) for token in range(VOCAB)]
    rust = RustTokenizer(models.BPE({name: token for token, name in enumerate(names)}, []))
    rust.decoder = decoders.Fuse()
    rust.add_special_tokens([AddedToken("<|stop|>", special=True)])
    model, tokenizer = FakeModel(mesh_of(1, 1, 1)), Tokenizer(rust)
    text = "".join(names[token] for token in full[:3])
    for settings, shown in (
        ({"stop": "<|stop|>"}, text),
        ({"stop": text[-1] + "<|st"}, text[:-1]),
        # The token that ends the text is the end of a stop string too: what stands before it is cut off.
        ({"stop": text[-1] + "<|stop|>", "eos_token_id": special}, text[:-1]),
        ({"eos_token_id": special}, text),
    ):
        events = []
        (out,) = jaxmoe.generate(
            model, [[0, 1, 2]], max_new_tokens=12, tokenizer=tokenizer, stream=events.append, **settings
        )
        assert (out.token_ids, out.text, out.finish_reason) == (full[:4], shown, "stop")
        assert "".join(event.text for event in events) == shown
        assert events[-1].finish_reason == "stop"


@pytest.mark.parity
@pytest.mark.parametrize(
    "stops", [["<|end|>"], ["a<|end|>"], ["<|end|>b", "ba"], ["|>"], ["<|end|><|start|>"]], ids=str
)
def test_stops_where_transformers_does(tmp_path, stops) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(save(byte_level(), tmp_path))
    criteria = transformers.StopStringCriteria(theirs, stops)
    generator = torch.Generator().manual_seed(0)
    alphabet = torch.tensor([*ids_of("a"), *ids_of("b"), START, END])
    stopped = 0
    for _ in range(40):
        ids = alphabet[torch.randint(4, (12,), generator=generator)]
        expected = next((n for n in range(1, 13) if bool(criteria(ids[None, :n], None)[0])), None)
        assert first_stop(ids.tolist(), stops)[0] == expected, ids
        stopped += expected is not None
    assert stopped > 5
