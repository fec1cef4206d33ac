"""Recorded routing forced on a model: calls, generation and training steps, on other meshes and placements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.generation.programs import programs_of
from jaxmoe.models.decoder import _all_logits
from jaxmoe.placement import RoutingTrace
from tests.support import runs
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of

E, LAYERS, K = 11, 2, 3
TOKENS = np.arange(3, 21).reshape(2, 9)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
EOS = 10  # ends the third prompt's text with its first token, the first one's with its third


def load(family: str, shape, **settings):
    return jaxmoe.load(GOLDENS / family / "original", mesh=mesh_of(*shape), **settings)


@pytest.fixture(scope="module")
def models():
    """One model on two meshes, with another placement on the second, and replicas."""
    slots = np.random.default_rng(0).permutation([*range(E), *range(5)])
    return load("qwen3_moe", (1, 1, 1)), load("qwen3_moe", (1, 2, 4), placement=jaxmoe.ExpertPlacement(E, 4, slots))


def trace_of(model, run) -> tuple[object, RoutingTrace]:
    with model.record_routing(token_ids=True) as routing:
        result = run(model)
    return result, routing.trace()


def replayed(model, trace: RoutingTrace, run) -> tuple[object, RoutingTrace]:
    """What `run` gives with the trace's choices, and what was recorded of it meanwhile."""
    with model.replay_routing(trace):
        return trace_of(model, run)


def call(model) -> np.ndarray:
    return np.asarray(model(TOKENS))


def generate(model, **settings) -> list[jaxmoe.generation.Output]:
    return jaxmoe.generate(model, PROMPTS, max_new_tokens=8, **{"eos_token_id": EOS, **settings})


def other_choices(seed: int, tokens: int = TOKENS.size) -> RoutingTrace:
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(E), (tokens, LAYERS, 1)), axis=2)
    return RoutingTrace.from_expert_ids(order[:, :, :K], E)


def assert_same(first: RoutingTrace, second: RoutingTrace) -> None:
    np.testing.assert_array_equal(first.expert_ids, second.expert_ids)


@pytest.mark.full
def test_a_call_takes_the_choices_on_every_mesh(models) -> None:
    own, trace = trace_of(models[0], call)
    logits, again = replayed(models[0], trace, call)
    np.testing.assert_allclose(logits, own, rtol=1e-4, atol=1e-5)
    assert_same(again, trace)
    forced = other_choices(1)
    results = [replayed(model, forced, call) for model in models]
    for logits, recorded in results:
        assert_same(recorded, forced)
        assert np.abs(logits - own).max() > 0.01
    np.testing.assert_allclose(results[0][0], results[1][0], atol=2e-5)
    np.testing.assert_array_equal(call(models[0]), own)


def test_a_token_without_a_choice_is_routed_by_the_router(models) -> None:
    _, own = trace_of(models[0], call)
    forced = other_choices(2).expert_ids.copy()
    forced[4:, :] = -1
    forced[:4, 1] = -1
    _, found = replayed(models[1], RoutingTrace.from_expert_ids(forced, E), call)
    np.testing.assert_array_equal(found.expert_ids[:4, 0], forced[:4, 0])
    # Tokens 9 to 17 are the other row, which saw nothing of what was forced.
    np.testing.assert_array_equal(found.expert_ids[9:], own.expert_ids[9:])
    assert (found.expert_ids >= 0).all()


@pytest.mark.full
@pytest.mark.parametrize("settings", [{}, {"ignore_eos": True}], ids=["rows end early", "all rows reach the limit"])
def test_a_generation_is_replayed_step_by_step(models, settings) -> None:
    def run(model):
        return generate(model, **settings)

    outs, trace = trace_of(models[0], run)
    for model in models:
        again, recorded = replayed(model, trace, run)
        assert again == outs
        assert_same(recorded, trace)
    # Brought into rows, a call with all tokens takes them as well, and predicts what was generated.
    lengths = [(len(out.prompt_token_ids), len(out.token_ids)) for out in outs]
    rows = trace.by_sequence(*zip(*lengths, strict=True))
    sequences = [out.prompt_token_ids + out.token_ids for out in outs]
    S = max(map(len, sequences))
    tokens = np.array([sequence + [0] * (S - len(sequence)) for sequence in sequences])
    logits, recorded = replayed(models[1], rows, lambda model: np.asarray(model(tokens)))
    chosen = (rows.expert_ids >= 0).all(axis=(1, 2))
    assert chosen.sum() == len(trace.expert_ids)
    np.testing.assert_array_equal(recorded.expert_ids[chosen], rows.expert_ids[chosen])
    for row, (prompt, generated), out in zip(logits, lengths, outs, strict=True):
        assert row[prompt - 1 : prompt + generated - 1].argmax(axis=-1).tolist() == out.token_ids


@pytest.mark.full
def test_a_generation_takes_choices_that_are_not_its_own(models) -> None:
    outs, trace = trace_of(models[0], lambda model: generate(model, ignore_eos=True))
    forced = other_choices(3, len(trace.expert_ids)).expert_ids
    forced = RoutingTrace.from_expert_ids(forced, E, window=trace.window_sizes)
    results = [replayed(model, forced, lambda model: generate(model, ignore_eos=True)) for model in models]
    for again, recorded in results:
        assert again == results[0][0]
        assert_same(recorded, forced)
    assert [out.token_ids for out in results[0][0]] != [out.token_ids for out in outs]


@pytest.mark.full
def test_a_training_step_sees_them_and_compiles_once(models) -> None:
    """In a program that takes the model and, in the full run, eagerly, with gradients to the routers by the weights."""

    def loss(model):
        log_p_BSV = jax.nn.log_softmax(model(TOKENS)[:, :-1])
        return -jnp.take_along_axis(log_p_BSV, TOKENS[:, 1:, None], axis=2).mean()

    traced = []

    @nnx.jit
    def step(model):
        traced.append(1)
        return nnx.value_and_grad(loss)(model)

    values = []
    for seed in (1, 4):
        found = []
        for model in models:
            with model.replay_routing(other_choices(seed)):
                found.append(step(model))
        (one, one_grads), (two, two_grads) = found
        np.testing.assert_allclose(one, two, rtol=1e-5)
        for layer in range(LAYERS):
            routers = [np.asarray(grads["layers"][layer]["moe"]["w_router"][...]) for grads in (one_grads, two_grads)]
            assert np.abs(routers[0]).max() > 1e-5
            np.testing.assert_allclose(*routers, atol=1e-6)
        values.append(float(one))
    assert len(traced) == len(models)
    with models[0].replay_routing(other_choices(4)):
        again, grads = nnx.value_and_grad(loss)(models[0]) if runs.full else step(models[0])
    np.testing.assert_allclose(again, values[1], rtol=1e-6)
    assert values[0] != values[1]
    plain = float(step(models[0])[0])
    assert plain not in values
    assert len(traced) == len(models) + 1
    # The direction of the gradient: a small step along it lowers the loss by as much as it says.
    weight = models[0].moe_layers[0].w_router
    gradient, before = grads["layers"][0]["moe"]["w_router"][...], weight[...]
    change = 1e-2 / float(jnp.linalg.norm(gradient))
    with models[0].replay_routing(other_choices(4)):
        ends = []
        for sign in (1, -1):
            weight.set_value(before + sign * change * gradient)
            ends.append(float(loss(models[0])))
        weight.set_value(before)
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, jnp.linalg.norm(gradient), rtol=0.05)


@pytest.mark.full
def test_another_trace_compiles_nothing(models) -> None:
    model = models[0]
    with model.replay_routing(other_choices(5)):
        call(model)
    compiled = _all_logits._cache_size()
    with model.replay_routing(other_choices(6, 2 * 10)):
        model(np.ones((2, 10), int))  # rounded up to the same length
    assert _all_logits._cache_size() == compiled
    _, trace = trace_of(model, lambda model: generate(model, ignore_eos=True))
    sizes = []
    for seed in range(2):
        forced = other_choices(seed, len(trace.expert_ids)).expert_ids
        with model.replay_routing(RoutingTrace.from_expert_ids(forced, E, window=trace.window_sizes)):
            generate(model, ignore_eos=True)
        sizes.append(len(programs_of(model).compiled))
    assert sizes[0] == sizes[1]


@pytest.mark.full
@pytest.mark.parametrize("family", ["hunyuan_v1_moe", "gemma4_text"])
def test_layers_of_different_choices_and_a_router_with_an_input_of_its_own(family) -> None:
    model = load(family, (1, 1, 2))
    own, trace = trace_of(model, call)
    reversed_ids = np.where(trace.expert_ids < 0, -1, (trace.expert_ids + 1) % E)
    logits, again = replayed(model, RoutingTrace.from_expert_ids(reversed_ids, E), call)
    np.testing.assert_array_equal(again.expert_ids, reversed_ids)
    assert np.abs(logits - own).max() > 1e-3
    logits, again = replayed(model, trace, call)
    np.testing.assert_allclose(logits, own, rtol=1e-4, atol=1e-5)
    assert_same(again, trace)


def test_what_does_not_fit_is_refused(models) -> None:
    model, fitting = models[0], other_choices(0)
    ids = fitting.expert_ids
    one_twice, part = ids.copy(), ids.copy()
    one_twice[3, 1, :2], part[3, 1, 0] = 4, -1
    for trace, message in (
        (RoutingTrace(counts=fitting.counts), r"counts only; record it with model.record_routing\(token_ids=True\)"),
        (
            RoutingTrace.from_expert_ids(ids[:, :1], E),
            "trace has 1 MoE layers, 11 experts and 3 .* the model 2, 11 and 3",
        ),
        (RoutingTrace.from_expert_ids(ids, 12), "trace has 2 MoE layers, 12 experts and 3"),
        (RoutingTrace.from_expert_ids(ids[:, :, :2], E), "11 experts and 2 choices a token, and the model 2, 11 and 3"),
        (RoutingTrace.from_expert_ids(one_twice, E), r"MoE layer 1 of the trace: the choice .* got \[4, 4, \d+\]"),
        (RoutingTrace.from_expert_ids(part, E), r"MoE layer 1 of the trace: .* got \[-1, "),
    ):
        with pytest.raises(ValueError, match=message), model.replay_routing(trace):
            pytest.fail("the block was entered")
    assert model.replay is None
    with model.replay_routing(fitting):
        with pytest.raises(ValueError, match=r"the trace has 18 tokens, and the call 1 x 9; take the call's part"):
            model(TOKENS[:1])
        with pytest.raises(RuntimeError, match="one `with model.replay_routing"), model.replay_routing(fitting):
            pytest.fail("the block was entered")
        with pytest.raises(RuntimeError, match=r"closes over the model, .* as nnx\.jit\(f\)\(model, tokens\) does"):
            jax.jit(lambda tokens: model(tokens))(TOKENS)
        with pytest.raises(ValueError, match=r"a trace is being replayed on this model: move it outside"):
            jaxmoe.move(model, mesh=model.mesh)
    hunyuan = load("hunyuan_v1_moe", (1, 1, 1))
    with (
        pytest.raises(ValueError, match="layer 1 of the trace: a token has 2 choices here"),
        hunyuan.replay_routing(fitting),
    ):
        pytest.fail("the block was entered")


@pytest.mark.full
def test_another_generation_than_the_recorded_is_refused(models) -> None:
    model = models[0]
    _, trace = trace_of(model, generate)
    steps = trace.num_windows
    for part, settings, message in (
        (trace, {"max_new_tokens": steps - 1}, rf"the trace has {steps} steps and max_new_tokens is {steps - 1}"),
        (trace, {"prompts": PROMPTS[:2]}, r"step 0 has 8 tokens here, and the trace has 9 tokens"),
        (trace, {"ignore_eos": True}, r"step 2 has 3 tokens here, and the trace has 2 tokens"),
        (trace.windows(0, 3), {}, r"step 3 has \d tokens here, and the trace has no such step"),
        (trace, {"eos_token_id": list(range(97))}, r"the trace has \d+, and all rows had ended after 2"),
    ):
        arguments = {"prompts": PROMPTS, "max_new_tokens": 8, "eos_token_id": EOS, **settings}
        with model.replay_routing(part), pytest.raises(ValueError, match=message):
            jaxmoe.generate(model, arguments.pop("prompts"), **arguments)


def test_a_generations_steps_are_brought_into_rows() -> None:
    """The id of every choice says whose it is: 10 · row + place."""
    prompts, generated = [2, 1, 3], [4, 1, 2]
    steps = [[0, 1, 10, 20, 21, 22], [2, 11, 23], [3, 24], [4]]  # the first row reached its limit
    ids = np.concatenate(steps)[:, None, None]
    trace = RoutingTrace.from_expert_ids(ids, 30, window=list(map(len, steps)))
    rows = [[0, 1, 2, 3, 4, -1], [10, 11, -1, -1, -1, -1], [20, 21, 22, 23, 24, -1]]
    for length in (None, 5, 8):
        found = trace.by_sequence(prompts, generated, length=length)
        size = length or 6
        expected = [[*row, -1, -1][:size] for row in rows]
        assert found.expert_ids[:, 0, 0].reshape(3, -1).tolist() == expected
        assert found.num_windows == 1
    with pytest.raises(ValueError, match=r"here of \[6, 3, 3, 1\] tokens; got \[6, 3, 2, 1\]"):
        trace.by_sequence(prompts, [4, 2, 2])
    with pytest.raises(ValueError, match="counts only"):
        RoutingTrace(counts=trace.counts).by_sequence(prompts, generated)
    with pytest.raises(ValueError, match=r"0 <= start < stop <= 4; got 3, 5"):
        trace.windows(3, 5)
