"""`jaxmoe.generate` on a fake model with a real tokenizer: prompts, text, streaming, errors."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

import jaxmoe
from jaxmoe.generation import GenerationStats, TokenEvent, Tokenizer, encode
from tests.support.fake_model import FakeConfig, FakeModel, expected
from tests.support.meshes import mesh_of
from tests.support.tokenizers import byte_level, save

# The fake's 37 tokens as letters, so that its text can be read off its token ids.
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "


def letters() -> Tokenizer:
    rust = RustTokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    rust.decoder = decoders.Fuse()
    return Tokenizer(rust)


def text_of(token_ids) -> str:
    return "".join(LETTERS[token] for token in token_ids)


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel(mesh_of(1, 1, 1))


def test_text_and_token_ids_give_the_same(model) -> None:
    ids = [[0, 1, 2], [10, 20]]
    from_ids = jaxmoe.generate(model, ids, max_new_tokens=8)
    from_text = jaxmoe.generate(model, ["abc", "ku"], max_new_tokens=8, tokenizer=letters())
    assert [out.token_ids for out in from_ids] == [expected(prompt, 8) for prompt in ids]
    assert [out.token_ids for out in from_text] == [out.token_ids for out in from_ids]
    assert [out.text for out in from_ids] == [None, None]
    assert [out.text for out in from_text] == [text_of(out.token_ids) for out in from_text]
    assert [out.prompt_token_ids for out in from_text] == ids


def test_sampling_params_are_the_settings_in_one(model) -> None:
    settings = {"temperature": 6.0, "top_k": 5, "repetition_penalty": 1.5}
    one_by_one = jaxmoe.generate(model, [[1, 2]], max_new_tokens=10, seed=3, **settings)
    params = jaxmoe.SamplingParams(**settings)
    assert jaxmoe.generate(model, [[1, 2]], max_new_tokens=10, seed=3, sampling_params=params) == one_by_one
    assert one_by_one[0].token_ids != expected([1, 2], 10)
    # The same setting in both places is no contradiction.
    both = jaxmoe.generate(model, [[1, 2]], max_new_tokens=10, seed=3, sampling_params=params, top_k=np.int32(5))
    assert both == one_by_one


@pytest.mark.parametrize(
    "prompts", ["abc", ["abc"], [[0, 1, 2]], [(0, 1, 2)], np.array([[0, 1, 2]]), [np.arange(3, dtype=np.uint16)]]
)
def test_ways_to_write_a_prompt(model, prompts) -> None:
    outs = jaxmoe.generate(model, prompts, max_new_tokens=3, tokenizer=letters())
    assert [out.token_ids for out in outs] == [expected([0, 1, 2], 3)]


def test_events_tell_the_whole_story(model) -> None:
    events: list[TokenEvent] = []
    outs = jaxmoe.generate(model, ["abc", "ku"], max_new_tokens=8, tokenizer=letters(), stream=events.append)
    for index, out in enumerate(outs):
        own = [event for event in events if event.index == index]
        assert [event.token_id for event in own] == out.token_ids
        assert "".join(event.text for event in own) == out.text
        assert [event.finish_reason for event in own] == [None] * 7 + ["length"]


def test_a_stop_string_over_tokens_is_cut_before_it_is_shown(model) -> None:
    full = text_of(expected([0, 1, 2], 20))
    stop = full[5:8]
    cut = full.index(stop)
    events: list[TokenEvent] = []
    (out,) = jaxmoe.generate(
        model, ["abc"], max_new_tokens=20, tokenizer=letters(), stop=["never", stop], stream=events.append
    )
    assert (out.text, out.finish_reason) == (full[:cut], "stop")
    assert len(out.token_ids) == cut + 3
    assert "".join(event.text for event in events) == full[:cut]
    assert events[-1].finish_reason == "stop"


def test_a_stop_string_in_the_last_token_counts(model) -> None:
    full = text_of(expected([0, 1, 2], 4))
    (out,) = jaxmoe.generate(model, "abc", max_new_tokens=4, tokenizer=letters(), stop=full[-1])
    assert out.finish_reason == "stop"
    assert out.text == full[: full.index(full[-1])]


def test_what_was_held_back_comes_at_the_end(model) -> None:
    full = text_of(expected([0, 1, 2], 6))
    (out,) = jaxmoe.generate(model, "abc", max_new_tokens=6, tokenizer=letters(), stop=full[-2:] + "#")
    assert (out.text, out.finish_reason) == (full, "length")


def test_eos_is_a_token_but_no_text(model) -> None:
    full = expected([0, 1, 2], 12)
    eos = next(token for i, token in enumerate(full) if i >= 3 and token not in full[:i])
    (out,) = jaxmoe.generate(model, "abc", max_new_tokens=12, tokenizer=letters(), eos_token_id=eos)
    assert out.token_ids == full[: full.index(eos) + 1]
    assert (out.text, out.finish_reason) == (text_of(out.token_ids[:-1]), "stop")
    unused = next(token for token in range(model.config.vocab_size) if token not in full)
    for chosen in ([unused, eos], np.array([eos]), np.int64(eos)):
        assert jaxmoe.generate(model, "abc", max_new_tokens=12, tokenizer=letters(), eos_token_id=chosen)[0] == out
    (on,) = jaxmoe.generate(model, [[0, 1, 2]], max_new_tokens=12, eos_token_id=eos, ignore_eos=True)
    assert on.token_ids == full


@pytest.mark.parametrize(
    ("generation", "config", "count"),
    [({"eos_token_id": "EOS"}, {"eos_token_id": 5000}, 4), ({}, {"eos_token_id": [5000, "EOS"]}, 4), (None, {}, 12)],
)
def test_eos_of_the_checkpoint(tmp_path, generation, config, count) -> None:
    full = expected([0, 1, 2], 12)
    assert full[3] not in full[:3]

    def write(name: str, content: dict) -> None:
        (tmp_path / name).write_text(json.dumps(content).replace('"EOS"', str(full[3])))

    write("config.json", config)
    if generation is not None:
        write("generation_config.json", generation)
    model = FakeModel(mesh_of(1, 1, 1), source=tmp_path)
    assert len(jaxmoe.generate(model, [[0, 1, 2]], max_new_tokens=12)[0].token_ids) == count


def test_the_tokenizer_of_the_checkpoint_and_its_chat_template(tmp_path) -> None:
    rust = byte_level(bos=True)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ ending }}"
    save(rust, tmp_path, chat_template=template)
    model = FakeModel(mesh_of(1, 1, 1), source=tmp_path, config=FakeConfig(vocab_size=rust.get_vocab_size()))

    def prompt_of(prompts, **kwargs) -> list[int]:
        return encode(model, prompts, max_new_tokens=4, **kwargs)[0]

    start = rust.token_to_id("<|start|>")
    assert prompt_of("Hi") == [start, *rust.encode("Hi", add_special_tokens=False).ids]
    chat = rust.encode("[user] Hi\n!", add_special_tokens=False).ids
    assert prompt_of("Hi", chat=True, chat_template_kwargs={"ending": "!"}) == chat
    assert prompt_of([[{"role": "user", "content": "Hi"}]], chat_template_kwargs={"ending": "!"}) == chat


def test_seeds(model) -> None:
    def texts(**kwargs) -> list[list[int]]:
        outs = jaxmoe.generate(model, [[1, 2], [1, 2], [3]], max_new_tokens=10, temperature=6.0, **kwargs)
        return [out.token_ids for out in outs]

    one = texts(seed=3)
    assert one == texts(seed=3)
    assert one[0] == one[1]
    assert texts(seed=[3, 4, 3]) == [one[0], texts(seed=4)[0], one[2]]
    fresh = texts()
    assert fresh[0] != fresh[1]
    assert fresh != texts()


def test_stats_are_filled(model) -> None:
    stats = GenerationStats()
    jaxmoe.generate(model, [[1, 2, 3], [4]], max_new_tokens=5, stats=stats)
    assert (stats.prompts, stats.prompt_tokens, stats.generated_tokens, stats.decode_tokens) == (2, 4, 10, 8)
    assert stats.first_token_seconds > 0
    assert stats.to_dict()["decode_tokens_per_second"] == stats.decode_tokens_per_second > 0
    both = stats + GenerationStats(prompts=1, decode_seconds=1.0, first_token_seconds=9.0)
    assert both.prompts == 3
    assert both.first_token_seconds == stats.first_token_seconds
    assert "decode 8 tokens at" in stats.summary()


ERRORS = {
    "a message": (
        {"role": "user", "content": "hi"},
        {},
        r"prompts is a list; .* for one conversation write \[\[\{'role'",
    ),
    "no prompt": ([], {}, r"at least one prompt; got an empty list"),
    "empty text": (["a", ""], {}, r"at least one character; prompt 1 is empty"),
    "empty ids": ([[1], []], {}, r"at least one token; prompt 1 is empty"),
    "flat ids": ([5, 6], {}, r"prompt 0 is the number 5; for one prompt write \[\[5, 6, 7\]\]"),
    "mixed kinds": (["a", [1]], {}, r"prompt 0 is text and prompt 1 is token ids; call once for each kind"),
    "no kind": ([None], {}, r"a list of chat messages; prompt 0 is None"),
    "floats": ([[1.0]], {}, r"prompt 0 is \[1.0\]"),
    "bools": ([[True]], {}, r"prompt 0 is \[True\]"),
    "chat of ids": ([[1]], {"chat": True}, r"chat=True is for text prompts"),
    "no template": (["a"], {"chat": True}, r"neither chat_template.jinja nor"),
    "id too large": ([[1], [3, 37]], {}, r"token ids are 0 to 36 \(vocab_size 37\); prompt 1 has 37"),
    "id below 0": ([[-1]], {}, r"prompt 0 has -1"),
    "no new token": ([[1]], {"max_new_tokens": 0}, r"max_new_tokens is an integer of at least 1; got 0"),
    "too long": (
        [[1] * 500],
        {"max_new_tokens": 13},
        r"max_position_embeddings \(512\): prompt 0 has 500 tokens and max_new_tokens is 13; ask for at most 12 new",
    ),
    "far too long": ([[1] * 600], {}, r"prompt 0 has 600 tokens and max_new_tokens is 64; shorten the prompt"),
    "bad setting": ([[1]], {"top_p": 2}, r"top_p is above 0 and at most 1 \(1 keeps all\); got 2"),
    "empty stop": (["a"], {"stop": ""}, r"a stop string is a text of at least one character; got \[''\]"),
    "seed count": ([[1]], {"seed": [1, 2], "temperature": 1.0}, r"got 2 seeds for 1 prompts"),
    "negative seed": ([[1]], {"seed": -1, "temperature": 1.0}, f"from 0 to {2**64 - 1}; got -1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_give_rule_value_and_way_out(model, case) -> None:
    prompts, settings, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        jaxmoe.generate(model, prompts, **{"tokenizer": letters(), **settings})


def test_text_without_a_tokenizer(model, tmp_path) -> None:
    with pytest.raises(ValueError, match="comes from no checkpoint directory: pass token ids or tokenizer="):
        jaxmoe.generate(model, "text")
    bare = FakeModel(mesh_of(1, 1, 1), source=tmp_path)
    assert jaxmoe.generate(bare, [[1]], max_new_tokens=2)[0].text is None
    for settings in ({"prompts": "text"}, {"prompts": [[1]], "stop": "x"}):
        with pytest.raises(FileNotFoundError, match="has none; pass token ids instead"):
            jaxmoe.generate(bare, max_new_tokens=2, **settings)


def test_a_prompt_may_fill_the_last_position(model) -> None:
    (out,) = jaxmoe.generate(model, [[1] * 500], max_new_tokens=12)
    assert out.token_ids == expected([1] * 500, 12)
