"""Continuous batching: every request is what it is alone, whatever comes, goes and runs beside it."""

from collections.abc import Iterable

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

import jaxmoe
from jaxmoe.generation import ContinuousEngine, EngineCounts, Request, SamplingParams, TokenResult
from jaxmoe.generation.continuous.programs import Choice
from tests.support.adapters import factors, write_adapter
from tests.support.families import EVERY_KIND
from tests.support.goldens import GOLDENS, read_expected
from tests.support.meshes import mesh_of

RNG = np.random.default_rng(0)
V, NEW = 97, 10
BEGINNING = RNG.integers(3, V, 17).tolist()
PROMPTS = [
    *(RNG.integers(3, V, length).tolist() for length in (1, 5, 8, 19, 22)),
    *([*BEGINNING, token] for token in (3, 4)),
    BEGINNING,
]
# What `jaxmoe.generate` can be asked for as well.
SETTINGS = [
    {},
    {"temperature": 0.9, "top_k": 7, "top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.4},
    {"repetition_penalty": 1.3},
]
REQUESTS = [(prompt, SETTINGS[number % 4], 5 + number % 6) for number, prompt in enumerate(PROMPTS)]
SMALL = {"num_slots": 3, "page_size": 4, "prefill_chunk": 8, "max_length": 40, "num_pages": 14}


def make_request(prompt: list[int], params: dict, new: int, **changes) -> Request:
    seed = None if params.get("temperature", 0) == 0 else 11
    return Request(token_ids=prompt, max_new_tokens=new, params=SamplingParams(**params), **{"seed": seed, **changes})


def run(engine: ContinuousEngine, requests: Iterable[Request]) -> list[list[TokenResult]]:
    """The results of requests that are all there at once, in their order."""
    found = {engine.submit(request): [] for request in requests}
    while engine.has_work:
        for result in engine.step():
            found[result.request_id].append(result)
    return list(found.values())


def tokens_of(results: list[TokenResult]) -> list[int]:
    return [result.token_id for result in results]


def check_idle(engine: ContinuousEngine) -> EngineCounts:
    counts = engine.counts
    assert (counts.waiting, counts.running, counts.pages_in_use) == (0, 0, 0)
    assert engine.step() == []
    return counts


@pytest.fixture(scope="module")
def model():
    return jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 1, 1))


@pytest.fixture(scope="module")
def engine(model) -> ContinuousEngine:
    return ContinuousEngine(model, **SMALL)


@pytest.fixture(scope="module")
def alone(model) -> list[list[int]]:
    """What one prompt at a time gives."""
    return [
        jaxmoe.generate(model, [prompt], max_new_tokens=new, ignore_eos=True, seed=11, **params)[0].token_ids
        for prompt, params, new in REQUESTS
    ]


@settings(max_examples=25)
@given(data=st.data())
def test_every_request_is_what_it_is_alone(engine, alone, data) -> None:
    """In any order, with any number of steps between them, some canceled: too few pages for all, so some are preempted."""
    while engine.has_work:  # of an example that has failed
        engine.step()
    numbers = data.draw(st.lists(st.integers(0, len(REQUESTS) - 1), min_size=1, max_size=9))
    found: dict[int, list[TokenResult]] = {}
    asked: dict[int, int] = {}
    canceled: set[int] = set()

    def step() -> None:
        for result in engine.step():
            assert result.request_id not in canceled
            found[result.request_id].append(result)

    for number in numbers:
        request_id = engine.submit(make_request(*REQUESTS[number]))
        found[request_id], asked[request_id] = [], number
        for _ in range(data.draw(st.integers(0, 6))):
            step()
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(asked)))
            if len(found[gone]) < len(alone[asked[gone]]):
                canceled.add(gone)
            engine.cancel(gone)
    while engine.has_work:
        step()
    check_idle(engine)
    for request_id, results in found.items():
        expected = alone[asked[request_id]]
        tokens = tokens_of(results)
        if request_id in canceled:
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
            assert [result.finish_reason for result in results] == [None] * (len(tokens) - 1) + ["length"]


def test_pages_run_out_and_beginnings_are_shared(engine, alone) -> None:
    before = engine.counts
    results = run(engine, [make_request(*REQUESTS[number]) for number in (3, 4, 5, 6, 7)])
    assert [tokens_of(one) for one in results] == [alone[number] for number in (3, 4, 5, 6, 7)]
    after = check_idle(engine)
    assert after.preemptions > before.preemptions
    assert after.cached_tokens > before.cached_tokens
    assert after.generated_tokens - before.generated_tokens == sum(map(len, results))


def test_no_program_beyond_those_that_were_listed(model, engine) -> None:
    """The programs are as many as the sizes say; whatever came before has compiled some of them and no other."""
    sizes = engine.sizes
    names = {(key[0], *key[1:4]) for key in engine.programs.compiled if key[0] == "prefill"}
    assert names <= {("prefill", *program) for program in sizes.prefills}
    assert {key[1] for key in engine.programs.compiled if key[0] == "decode"} <= {*sizes.lengths}
    assert {key[1] for key in engine.programs.compiled if key[0] == "sample"} <= {*Choice.all()}
    again = ContinuousEngine(model, **SMALL)
    assert again.programs is engine.programs


def test_tokens_are_handed_out_while_the_next_step_runs(engine, monkeypatch) -> None:
    launched: list[int] = []
    run_decode = ContinuousEngine._run_decode
    monkeypatch.setattr(
        ContinuousEngine, "_run_decode", lambda self, *args: launched.append(0) or run_decode(self, *args)
    )
    engine.submit(make_request([1, 2, 3], {}, 4))
    ahead = []
    while engine.has_work:
        ahead += [(len(launched), result.finish_reason) for result in engine.step()]
    assert ahead == [(1, None), (2, None), (3, None), (3, "length")]


def test_an_eos_token_ends_a_request_unless_it_comes_too_early(engine, alone) -> None:
    prompt, params, new = REQUESTS[4]
    eos = frozenset([alone[4][2]])
    first = alone[4].index(alone[4][2])
    (stopped,) = run(engine, [make_request(prompt, params, new, eos_token_ids=eos)])
    assert tokens_of(stopped) == alone[4][: first + 1]
    assert stopped[-1].finish_reason == "stop"
    (later,) = run(engine, [make_request(prompt, params, new, eos_token_ids=eos, min_new_tokens=first + 1)])
    assert tokens_of(later)[:first] == alone[4][:first]
    assert later[first].token_id not in eos
    assert len(later) > first + 1
    check_idle(engine)


def test_a_bias_and_the_log_probabilities_are_of_the_models_logits(model, engine) -> None:
    prompt = PROMPTS[3]
    logits = np.asarray(jax.nn.log_softmax(model([prompt])[0, -1]))
    order = np.argsort(-logits, kind="stable").tolist()
    plain, banned, pushed = run(
        engine,
        [
            make_request(prompt, {}, 2, logprobs=3),
            make_request(prompt, {}, 2, logprobs=0, logit_bias={order[0]: float("-inf")}),
            make_request(prompt, {}, 2, logit_bias={order[5]: 1000.0}),
        ],
    )
    assert plain[0].token_id == order[0]
    assert plain[0].top_logprobs is not None
    assert [token for token, _ in plain[0].top_logprobs] == order[:3]
    np.testing.assert_allclose([value for _, value in plain[0].top_logprobs], logits[order[:3]], atol=1e-4)
    assert banned[0].token_id == order[1]
    assert banned[0].top_logprobs == []
    assert banned[0].logprob == pytest.approx(logits[order[1]], abs=1e-4)
    assert tokens_of(pushed) == [order[5]] * 2
    assert pushed[0].logprob is pushed[0].top_logprobs is None


class Counting:
    """Allows the tokens 10, 11, 12, ... one after the other, then the end."""

    def __init__(self, count: int, end: int):
        self.accepted: list[int] = []
        self.count, self.end = count, end

    def allowed(self) -> np.ndarray:
        done = len(self.accepted) == self.count
        return np.arange(V) == (self.end if done else 10 + len(self.accepted))

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def test_a_constraint_is_obeyed_beside_others_that_have_none(engine, alone) -> None:
    constraint = Counting(5, end=2)
    constrained = make_request(PROMPTS[1], {"temperature": 1.0}, 9, constraint=constraint, eos_token_ids=frozenset([2]))
    others = [make_request(*REQUESTS[number]) for number in (0, 3)]
    results = run(engine, [others[0], constrained, others[1]])
    assert tokens_of(results[1]) == constraint.accepted == [10, 11, 12, 13, 14, 2]
    assert results[1][-1].finish_reason == "stop"
    assert [tokens_of(results[0]), tokens_of(results[2])] == [alone[0], alone[3]]


def test_a_constraint_that_allows_nothing_is_an_error(model) -> None:
    constraint = Counting(1, end=2)
    constraint.allowed = lambda: np.zeros(V, bool)  # type: ignore[method-assign]
    engine = ContinuousEngine(model, **SMALL)
    engine.submit(make_request([5], {}, 3, constraint=constraint))
    with pytest.raises(ValueError, match=r"allows at least one of the 97 tokens.*with 0 allowed"):
        engine.step()


def test_changed_weights_are_seen_and_share_nothing_with_the_old(model, engine, alone) -> None:
    run(engine, [make_request(*REQUESTS[5])])
    cached = engine.counts.cached_tokens
    head = model.lm_head.weight
    old = head.get_value()
    try:
        head.set_value(jax.device_put(-old, old.sharding))
        (changed,) = run(engine, [make_request(*REQUESTS[5])])
    finally:
        head.set_value(old)
    assert tokens_of(changed) != alone[5]
    assert engine.counts.cached_tokens == cached
    (again,) = run(engine, [make_request(*REQUESTS[5])])
    assert tokens_of(again) == alone[5]


@pytest.mark.full
def test_routing_is_recorded_token_by_token_once(model, engine) -> None:
    prompt = RNG.integers(3, V, 13).tolist()
    with model.record_routing() as routing:
        run(engine, [make_request(prompt, {}, 4)])
    # The last token is never computed.
    assert routing.counts().sum(axis=1).tolist() == [3 * (13 + 3)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [1, V]}, "from 0 to 96; got 97 in token_ids"),
        ({"logit_bias": {V: 1.0}}, "got 97 in logit_bias"),
        ({"max_new_tokens": 60}, "at most 40 tokens, the engine's max_length"),
        ({"adapter": "none"}, "none"),
    ],
)
def test_requests_that_cannot_run_are_refused(engine, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(**{"token_ids": [1], "max_new_tokens": 3, **changes}))
    check_idle(engine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slots": 0}, "num_slots is an integer of at least 1"),
        ({"page_size": 0}, "page_size is an integer of at least 1"),
        ({"max_length": 513}, "max_length is an integer from 2 to 512"),
        ({"num_pages": 0}, "num_pages is an integer of at least 1"),
    ],
)
def test_sizes_out_of_range_are_refused(model, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        ContinuousEngine(model, **changes)


@pytest.mark.full
def test_each_request_has_its_adapter(tmp_path) -> None:
    """Prompts alike, so that what one adapter has computed must not be shared with another."""
    sizes = {"q_proj": (64, 32), "v_proj": (16, 32)}
    parts = [(f"model.layers.{layer}.self_attn.{part}", *size) for layer in range(2) for part, size in sizes.items()]
    tensors = {name: value for part in parts for name, value in factors(*part).items()}
    model = jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 1, 1))
    jaxmoe.add_adapter(model, "tuned", write_adapter(tmp_path / "tuned", tensors))
    names = [None, "tuned", None, "tuned"]
    prompt = PROMPTS[3]
    alone = jaxmoe.generate(model, [prompt] * 4, max_new_tokens=6, ignore_eos=True, adapters=names)
    engine = ContinuousEngine(model, **SMALL)
    results = run(engine, [Request(token_ids=prompt, max_new_tokens=6, adapter=name) for name in names])
    assert [tokens_of(one) for one in results] == [output.token_ids for output in alone]
    assert alone[0].token_ids != alone[1].token_ids
    assert engine.counts.cached_tokens == 2 * 16
    jaxmoe.remove_adapter(model, "tuned")


# Of these the short run has recurrent states beside pages.
SHORT = ("qwen3_next",)
# Each kind of layer that has a cache of its own kind, and each kind of residual stream.
CACHES = (*EVERY_KIND, "deepseek_v32", "deepseek_v4", "kimi_linear", "lfm2_moe", "minimax_m3_vl_text", "qwen4_exp_text")


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in SHORT else pytest.mark.full) for f in CACHES])
def test_every_kind_of_cache_gives_what_transformers_gives(family) -> None:
    check_family(family, (1, 1, 1))


@pytest.mark.full
@pytest.mark.parametrize("family", ["qwen3_next", "deepseek_v3", "gpt_oss"])
def test_families_of_each_kind_on_a_mesh(family) -> None:
    check_family(family, (2, 2, 2))


def check_family(family: str, shape: tuple[int, int, int]) -> None:
    """The greedy tokens of all prompts, some twice: chunks, pages that run out, and shared beginnings."""
    expected = read_expected(family)
    model = jaxmoe.load(GOLDENS / family / "original", mesh=mesh_of(*shape))
    prompts = [prompt.tolist() for prompt in expected["prompt"]]
    greedy = [tokens[:14].tolist() for tokens in expected["greedy"]]
    longest = max(map(len, prompts)) + 14
    engine = ContinuousEngine(
        model, num_slots=2, page_size=4, prefill_chunk=8, max_length=longest, num_pages=-(-longest // 4) + 2
    )
    requests = [Request(token_ids=prompt, max_new_tokens=14) for prompt in prompts]
    results = run(engine, [*requests, *requests])
    assert [tokens_of(one) for one in results] == [*greedy, *greedy]
    counts = check_idle(engine)
    assert (counts.cached_tokens > 0) == engine.sizes.shares
