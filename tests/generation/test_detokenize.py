"""Streaming text: whole characters, nothing lost, nothing shown of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.generation.detokenize import Detokenizer, StopStrings, TextStream
from tests.support.tokenizers import byte_fallback, byte_level

TOKENIZER = byte_level()
FALLBACK = byte_fallback()
VOCAB = TOKENIZER.get_vocab_size()


def decode(ids) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def decode_fallback(ids) -> str:
    return FALLBACK.decode(list(ids), skip_special_tokens=True)


def pieces(decode, ids) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@given(st.lists(st.integers(0, VOCAB - 1), max_size=40))
def test_pieces_of_any_tokens_join_to_their_text(ids) -> None:
    assert "".join(pieces(decode, ids)) == decode(ids)


@given(st.text(max_size=40))
def test_a_text_comes_in_whole_characters(text) -> None:
    for encode, decode_ids in ((TOKENIZER, decode), (FALLBACK, decode_fallback)):
        ids = encode.encode(text, add_special_tokens=False).ids
        got = pieces(decode_ids, ids)
        assert "".join(got) == decode_ids(ids)
        if "�" not in text:
            assert not any("�" in piece for piece in got)


def test_a_character_waits_for_its_last_byte() -> None:
    ids = TOKENIZER.encode("a中🙂", add_special_tokens=False).ids
    assert [piece for piece in pieces(decode, ids) if piece] == ["a", "中", "🙂"]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    ids = TOKENIZER.encode("x🙂", add_special_tokens=False).ids[:-1]
    assert "".join(pieces(decode, ids)) == "x�"


def test_neighbouring_fallback_characters_do_not_disturb_each_other() -> None:
    # The decoder shows replacements for the first as long as the second is unfinished.
    ids = FALLBACK.encode("中中🙂", add_special_tokens=False).ids
    assert [piece for piece in pieces(decode_fallback, ids) if piece] == ["中", "中", "🙂"]


def test_only_the_first_space_of_a_text_is_dropped() -> None:
    ids = FALLBACK.encode("a b b", add_special_tokens=False).ids
    assert "".join(pieces(decode_fallback, ids)) == "a b b"


def test_special_tokens_are_no_text() -> None:
    special = TOKENIZER.token_to_id("<|end|>")
    ids = [special, *TOKENIZER.encode("a b").ids, special, special, *TOKENIZER.encode(" c").ids]
    assert "".join(pieces(decode, ids)) == "a b c"


def test_a_token_costs_the_same_at_the_end_of_a_long_text() -> None:
    lengths: list[int] = []

    def watched(ids) -> str:
        lengths.append(len(ids))
        return decode(ids)

    pieces(watched, TOKENIZER.encode("word and 中 " * 200, add_special_tokens=False).ids)
    assert max(lengths) < 12


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.data())
def test_stop_strings_cut_like_a_search_through_the_whole_text(text, stops, data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    stop = StopStrings(stops)
    edges = zip([0, *cuts], [*cuts, len(text)], strict=True)
    shown = "".join([*(stop.push(text[begin:end]) for begin, end in edges), stop.finish()])
    assert stop.found == any(one in text for one in stops)
    assert text.startswith(shown)
    if stop.found:
        assert not any(one in shown for one in stops)
        assert any(text.startswith(one, len(shown)) for one in stops)
    else:
        assert shown == text


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["END"], "the END of", "the "),
        (["é"], "caféine", "caf"),
        (["xyz"], "ends in xy", "ends in xy"),
        ([], "all", "all"),
    ],
)
def test_text_stream(stops, text, shown) -> None:
    stream, got = TextStream(decode, stops), []
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        got.append(stream.push(token))
        if stream.stopped:
            break
    got.append(stream.finish())
    assert "".join(got) == stream.text == shown
    assert stream.stopped == (shown != text)
