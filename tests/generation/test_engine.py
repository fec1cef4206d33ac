"""The generation loop, on a fake model whose every token is known."""

import gc
import weakref

import jax
import numpy as np
import pytest
from flax import nnx

from jaxmoe.generation import Engine, GenerationStats, SamplingParams
from jaxmoe.generation.programs import Programs, programs_of
from jaxmoe.models.padding import bucket_length
from tests.support.fake_model import VOCAB, FakeModel, expected, next_logits
from tests.support.meshes import mesh_of

GREEDY = SamplingParams()
PROMPTS = [[1, 2, 3], [5], list(range(30)), [7, 7, 7, 7], [36, 0, 1]]


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel(mesh_of(1, 1, 1))


def tokens(model: nnx.Module, prompts=PROMPTS, params=GREEDY, max_new_tokens=12, **kwargs) -> list[list[int]]:
    return [row.token_ids for row in Engine(model).run(prompts, params, max_new_tokens=max_new_tokens, **kwargs)]


@pytest.mark.covering(most=3)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 1, 8), (1, 8, 1)])
@pytest.mark.parametrize("count", [1, 5])
def test_every_row_is_what_it_is_alone(shape, count) -> None:
    rows = Engine(FakeModel(mesh_of(*shape))).run(PROMPTS[:count], GREEDY, max_new_tokens=12)
    assert [row.token_ids for row in rows] == [expected(prompt, 12) for prompt in PROMPTS[:count]]
    assert {row.finish_reason for row in rows} == {"length"}


def test_one_token_needs_no_decode_step(model) -> None:
    assert tokens(model, max_new_tokens=1) == [expected(prompt, 1) for prompt in PROMPTS]


def test_eos_ends_its_row_only_and_stays_in_the_tokens(model) -> None:
    alone = [expected(prompt, 12) for prompt in PROMPTS]
    eos = alone[0][4]
    rows = Engine(model).run(PROMPTS, GREEDY, max_new_tokens=12, eos_token_ids={eos})
    for row, full in zip(rows, alone, strict=True):
        ends = eos in full
        assert row.token_ids == (full[: full.index(eos) + 1] if ends else full)
        assert row.finish_reason == ("stop" if ends else "length")


def test_the_listener_sees_every_token_and_can_end_a_row(model) -> None:
    heard: list[tuple[int, int, str | None]] = []

    def listen(index: int, token: int, reason: str | None) -> bool:
        heard.append((index, token, reason))
        return index == 1 and sum(i == 1 for i, _, _ in heard) == 3

    rows = Engine(model).run(PROMPTS[:2], GREEDY, max_new_tokens=6, on_token=listen)
    assert [token for index, token, _ in heard if index == 0] == expected(PROMPTS[0], 6)
    assert rows[1].token_ids == expected(PROMPTS[1], 3)
    assert [row.finish_reason for row in rows] == ["length", "stop"]
    assert [reason for index, _, reason in heard if index == 0] == [None] * 5 + ["length"]


def test_the_next_step_is_dispatched_before_a_token_is_read(model, monkeypatch) -> None:
    dispatched, compile_decode = [], Programs.decode

    def counting(self, *compile_args):
        step = compile_decode(self, *compile_args)
        return lambda *args: dispatched.append(args) or step(*args)

    monkeypatch.setattr(Programs, "decode", counting)
    ahead = []
    tokens(model, PROMPTS[:1], max_new_tokens=5, on_token=lambda *_: ahead.append(len(dispatched)))
    # Four decode steps for five tokens, each one step ahead of the token being looked at; none beyond the last.
    assert ahead == [1, 2, 3, 4, 4]


def test_the_cache_is_donated_and_laid_out_over_the_mesh(monkeypatch) -> None:
    model = FakeModel(mesh_of(2, 1, 4))
    caches, compile_decode = [], Programs.decode

    def keeping(self, *compile_args):
        step = compile_decode(self, *compile_args)

        def run(*args):
            logits, cache, routing = step(*args)
            caches.append((args[-1]["tokens"], cache["tokens"]))
            return logits, cache, routing

        return run

    monkeypatch.setattr(Programs, "decode", keeping)
    tokens(model, [[1], [2]] * 4, max_new_tokens=4)
    for before, after in caches:
        assert before.is_deleted()
        assert after.sharding.spec == jax.sharding.PartitionSpec(("dp", "ep"))
        assert after.sharding.shard_shape(after.shape) == (1, 16)


def test_few_programs_serve_many_lengths() -> None:
    model = FakeModel(mesh_of(1, 1, 1))
    for length in range(1, 200, 7):
        assert tokens(model, [[length % VOCAB] * length], max_new_tokens=9)[0] == expected([length % VOCAB] * length, 9)
    names = [key[0] for key in programs_of(model).compiled]
    # Prompts of 16, 32, 64, 128, 256 with caches of the same sizes or the next one up.
    assert names.count("decode") == names.count("init_cache") == 5
    assert names.count("prefill") <= 9
    assert names.count("sample") == 1


def test_nothing_compiles_for_other_settings_of_a_sampler() -> None:
    model = FakeModel(mesh_of(1, 1, 1))
    for temperature, top_k, top_p in [(0.5, 3, 0.9), (1.5, 7, 0.3), (0.1, 1, 0.99)]:
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0.01)
        tokens(model, params=params, seeds=[1] * 5)
    assert sum(key[0] == "sample" for key in programs_of(model).compiled) == 1
    before = set(programs_of(model).compiled)
    tokens(model)
    assert {key[0] for key in set(programs_of(model).compiled) - before} == {"sample"}


def test_a_second_engine_finds_the_programs_and_sees_swapped_weights() -> None:
    model = FakeModel(mesh_of(1, 1, 1))
    stats = GenerationStats()
    tokens(model, stats=stats)
    assert stats.compile_seconds > 0
    model.offset[...] = jax.device_put(np.int32(3), model.offset[...].sharding)
    stats = GenerationStats()
    assert tokens(model, stats=stats) == [expected(prompt, 12, offset=3) for prompt in PROMPTS]
    assert stats.compile_seconds == 0


def test_programs_go_with_their_model() -> None:
    model = FakeModel(mesh_of(1, 1, 1))
    tokens(model, max_new_tokens=2)
    programs = weakref.ref(programs_of(model))
    del model
    gc.collect()
    assert programs() is None


def test_a_seed_gives_the_same_text_in_any_batch_and_on_any_mesh() -> None:
    params = SamplingParams(temperature=8.0)
    one, eight = FakeModel(mesh_of(1, 1, 1)), FakeModel(mesh_of(2, 2, 2))
    alone = [tokens(one, [prompt], params, seeds=[7])[0] for prompt in PROMPTS]
    assert tokens(one, PROMPTS, params, seeds=[7] * 5) == alone
    assert tokens(eight, PROMPTS, params, seeds=[7] * 5) == alone
    assert tokens(eight, PROMPTS, params, seeds=[8] * 5) != alone


def test_rows_of_different_seeds_differ(model) -> None:
    rows = tokens(model, [[1, 2]] * 4, SamplingParams(temperature=5.0), seeds=[0, 1, 2**63, 2**32])
    assert len({tuple(row) for row in rows}) == 4


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_the_penalty_covers_prompt_and_generated_tokens(shape) -> None:
    rows = tokens(FakeModel(mesh_of(*shape)), params=SamplingParams(repetition_penalty=1e6), max_new_tokens=7)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        history = list(prompt)
        for token in row:
            logits = next_logits(history)
            logits[history] /= 1e6
            assert token == logits.argmax()
            history.append(token)


def test_stats_count_what_was_handed_out(model) -> None:
    stats = GenerationStats()
    rows = tokens(model, stats=stats, eos_token_ids={expected(PROMPTS[0], 5)[-1]})
    assert stats.prompts == 5
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.generated_tokens == sum(map(len, rows))
    assert stats.decode_tokens == stats.generated_tokens - 5
    assert min(stats.prefill_seconds, stats.decode_seconds) > 0


def test_buckets() -> None:
    sizes = sorted({bucket_length(length, limit=10_000) for length in range(1, 10_001)})
    assert sizes == [16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 10_000]
    assert all(bucket_length(length, limit=10_000) >= length for length in range(1, 10_001))
