"""What a recording of routing counts, and what it refuses instead of counting nothing."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.generation.programs import programs_of
from jaxmoe.models import routing as recording
from jaxmoe.models.routing import Routing, RoutingRecorder
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of

K, LAYERS = 3, 2
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
TOKENS = np.arange(8).reshape(2, 4)


@pytest.fixture(scope="module")
def model():
    return jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 1, 2))


def test_a_call_inside_a_program_is_refused(model) -> None:
    with model.record_routing() as routing:
        with pytest.raises(RuntimeError, match=r"inside a program of your own \(jit, vmap"):
            jax.jit(lambda tokens: model(tokens))(TOKENS)
        with pytest.raises(RuntimeError, match=r"outside of `with model\.record_routing"):
            model.moe_layers[0](jnp.ones((2, 32)))
        assert routing.num_steps == 0


@pytest.mark.full
def test_a_call_inside_a_program_is_refused_and_never_forgotten(model) -> None:
    in_jit = nnx.jit(lambda model, tokens: model(tokens))
    layer_in_jit = nnx.jit(lambda model, x: model.moe_layers[0](x)[0])
    x, lengths = jnp.ones((2, 32)), np.full(2, 4, np.int32)
    # Compiled before: they would run without a question, were a recorded model's structure the same.
    plain, plain_layer = in_jit(model, TOKENS), layer_in_jit(model, x)
    own_program, only_the_record = (
        r"inside a program of your own \(jit, vmap",
        r"outside of `with model\.record_routing",
    )
    with model.record_routing() as routing:
        for call, message in (
            (lambda: in_jit(model, TOKENS), own_program),
            (lambda: jax.jit(lambda tokens: model(tokens))(TOKENS), own_program),
            (lambda: jax.vmap(lambda tokens: model(tokens[None]))(TOKENS), own_program),
            (lambda: jax.checkpoint(lambda tokens: model(tokens))(TOKENS), own_program),
            (lambda: layer_in_jit(model, x), only_the_record),
            (lambda: model.moe_layers[0](x), only_the_record),
            (lambda: model.logits_and_stats(TOKENS, lengths), only_the_record),
        ):
            with pytest.raises(RuntimeError, match=message):
                call()
        assert routing.num_steps == 0
        model(TOKENS)
    assert routing.trace().counts.sum(axis=2).tolist() == [[8 * K] * LAYERS]
    np.testing.assert_array_equal(in_jit(model, TOKENS), plain)
    np.testing.assert_array_equal(layer_in_jit(model, x), plain_layer)


@pytest.mark.full
def test_a_gradient_outside_of_a_program_is_recorded(model) -> None:
    with model.record_routing() as routing:
        nnx.value_and_grad(lambda model: model(TOKENS).sum())(model)
    assert routing.trace().counts.sum(axis=2).tolist() == [[8 * K] * LAYERS]


@pytest.mark.full
def test_copies_made_meanwhile_are_not_recorded(model) -> None:
    with model.record_routing() as routing:
        copies = [nnx.clone(model), copy.deepcopy(model)]
        for each in copies:
            assert each.recorder is None
            each(TOKENS)
            each.moe_layers[0](jnp.ones((2, 32)))
            jaxmoe.generate(each, PROMPTS[:1], max_new_tokens=2)
        assert routing.num_steps == 0
        model(TOKENS)
    assert routing.num_steps == 1
    for each in copies:
        each(TOKENS)
    assert routing.num_steps == 1


@pytest.mark.full
def test_a_token_is_counted_once_alone_and_in_a_batch(model) -> None:
    full = [out.token_ids for out in jaxmoe.generate(model, PROMPTS, max_new_tokens=8, ignore_eos=True)]
    for eos in {token for row in full for token in row[:3]}:
        with model.record_routing() as together:
            outs = jaxmoe.generate(model, PROMPTS, max_new_tokens=8, eos_token_id=eos)
        with model.record_routing() as alone:
            for prompt in PROMPTS:
                jaxmoe.generate(model, [prompt], max_new_tokens=8, eos_token_id=eos)
        np.testing.assert_array_equal(together.counts(), alone.counts())
        # The token of the last place is never given to the model.
        tokens = sum(len(out.prompt_token_ids) + min(len(out.token_ids), 7) for out in outs)
        assert together.counts().sum(axis=1).tolist() == [tokens * K] * LAYERS


@pytest.mark.full
def test_recording_and_replaying_leave_the_programs_that_are_there(model) -> None:
    structure = nnx.split(model)[0]
    jaxmoe.generate(model, PROMPTS, max_new_tokens=4)
    programs = dict(programs_of(model).compiled)
    with model.record_routing(token_ids=True) as routing:
        jaxmoe.generate(model, PROMPTS, max_new_tokens=4)
    with model.replay_routing(routing.trace()):
        jaxmoe.generate(model, PROMPTS, max_new_tokens=4)
    jaxmoe.generate(model, PROMPTS, max_new_tokens=4)
    assert nnx.split(model)[0] == structure
    assert programs.items() <= programs_of(model).compiled.items()


def made_up_steps(count: int, tokens: int = 5) -> list[Routing]:
    ids = np.random.default_rng(count).integers(0, 11, (count, tokens, LAYERS, K)).astype(np.int32)
    counts = [[np.bincount(step[:, layer].ravel(), minlength=11) for layer in range(LAYERS)] for step in ids]
    return [Routing(np.array(each, np.int32), step) for each, step in zip(counts, ids, strict=True)]


def test_a_long_record_of_counts_stays_small_and_counts_every_step(monkeypatch) -> None:
    monkeypatch.setattr(recording, "MOST_WINDOWS", 8)
    recorder, steps = RoutingRecorder(token_ids=False), made_up_steps(100)
    counts = np.array([step.counts for step in steps])
    for done, step in enumerate(steps, 1):
        recorder.add(step)
        windows, each = recorder.trace().counts, recorder.steps_per_window
        assert recorder.num_steps == done
        assert len(windows) <= 8
        assert done <= 8 or len(windows) > 4, "no more is given up than has to be"
        np.testing.assert_array_equal(windows, [counts[:done][at : at + each].sum(0) for at in range(0, done, each)])
        np.testing.assert_array_equal(recorder.counts(), counts[:done].sum(0))
    assert recorder.steps_per_window == 16


def test_choices_that_have_no_room_are_dropped_and_told() -> None:
    steps = made_up_steps(10)
    size = steps[0].expert_ids.nbytes
    recorder = RoutingRecorder(token_ids=True, most_bytes=3 * size)
    for step in steps[:3]:
        recorder.add(step)
    whole = recorder.trace()
    assert (whole.num_windows, recorder.dropped_steps) == (3, 0)
    # A step that would have room has none behind one that was dropped.
    for step in (*steps[3:], Routing(steps[0].counts * 0, steps[0].expert_ids[:0])):
        recorder.add(step)
    assert (recorder.num_steps, recorder.dropped_steps) == (11, 8)
    with pytest.raises(ValueError, match=rf"most_bytes \({3 * size} bytes\); those of the last 8 of 11 steps did not"):
        recorder.trace()
    np.testing.assert_array_equal(recorder.trace(incomplete=True).expert_ids, whole.expert_ids)
    np.testing.assert_array_equal(recorder.counts(), sum(step.counts for step in steps))
    tight = RoutingRecorder(token_ids=True, most_bytes=1)
    tight.add(steps[0])
    with pytest.raises(ValueError, match="were dropped: take counts"):
        tight.trace(incomplete=True)


def test_bounds_of_a_record_are_checked(model) -> None:
    with pytest.raises(ValueError, match="got 5 with token_ids=False"), model.record_routing(most_bytes=5):
        pass
    with (
        pytest.raises(ValueError, match="most_bytes is an integer of at least 1; got 0"),
        model.record_routing(token_ids=True, most_bytes=0),
    ):
        pass
    assert model.recorder is None
    with model.record_routing(token_ids=True, most_bytes=8 * LAYERS * K * 4) as routing:
        model(TOKENS)
        model(TOKENS)
    assert (routing.num_steps, routing.dropped_steps) == (2, 1)
    np.testing.assert_array_equal(routing.counts(), 2 * routing.trace(incomplete=True).total_counts)
