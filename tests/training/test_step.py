"""The training step against the same step of the dense oracle, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts._train.run import evaluate
from scripts._train.step import Recipe, Trainer
from tests.support.dense_training import make_dense
from tests.support.meshes import mesh_of
from tests.support.tiny_training import RECIPE, TINY, tiny_model, tiny_text


@pytest.mark.full
def test_a_step_equals_the_dense_step_on_one_device(tmp_path):
    """Losses, gradient norm, counts, and every parameter after two steps, over a (2, 2, 2) mesh."""
    dense = Trainer(make_dense(tiny_model(tmp_path, mesh_of(1, 1, 1))), RECIPE)
    sharded = Trainer(tiny_model(tmp_path, mesh_of(2, 2, 2)), RECIPE)
    batches, _ = tiny_text()
    states = {trainer: trainer.init() for trainer in (dense, sharded)}
    for step in range(2):
        metrics = {}
        for trainer, state in states.items():
            states[trainer], metrics[trainer] = trainer.step(state, trainer.shard(batches[step]))
        for name in metrics[dense]._fields:
            actual, expected = (np.asarray(getattr(metrics[trainer], name)) for trainer in (sharded, dense))
            np.testing.assert_allclose(actual, expected, rtol=2e-5, err_msg=name)
    assert states[sharded].params.keys() == states[dense].params.keys()
    # The first update is zero, for the learning rate warms up; after the second the weights have moved by about a
    # fifth of its peak, whatever the size of the gradient, so that gradients near zero may differ in sign.
    moved = RECIPE.learning_rate / RECIPE.warmup
    for path, expected in states[dense].params.items():
        actual = np.asarray(states[sharded].params[path])
        difference = np.abs(actual - np.asarray(expected))
        assert np.quantile(difference, 0.99) < 1e-3 * moved, path
        assert difference.max() <= 2.2 * moved, path


@pytest.mark.full
def test_the_state_lies_on_the_mesh_as_the_weights_do(tmp_path):
    trainer = Trainer(tiny_model(tmp_path, mesh_of(2, 2, 2)), RECIPE)
    batches, _ = tiny_text()
    before = {path: param.sharding for path, param in trainer.init().params.items()}
    fresh = trainer.init()
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(fresh))
    state, _ = trainer.step(fresh, trainer.shard(batches[0]))
    experts = TINY["num_local_experts"]
    shapes = {shard.data.shape for shard in state.params["layers.0.moe.w_gate_up"].addressable_shards}
    assert shapes == {(experts // 4, 2, TINY["moe_intermediate_size"], TINY["hidden_size"])}
    for path, param in state.params.items():
        assert param.sharding.is_equivalent_to(before[path], param.ndim), path
    moments = state.optimizer[1][0].mu
    for path, moment in moments.items():
        assert moment.sharding.is_equivalent_to(before[path], moment.ndim), path


@pytest.mark.full
def test_padding_counts_in_no_loss(tmp_path):
    trainer = Trainer(tiny_model(tmp_path, mesh_of(2, 2, 2)), RECIPE)
    batches, _ = tiny_text()
    rows, lengths = batches[0], np.array([24, 3, 0, 24, 1, 9, 24, 0], np.int32)
    garbage = np.where(np.arange(25) <= lengths[:, None], rows, 7)
    params = trainer.init().params
    once, again = (
        jax.jit(trainer.loss)(params, trainer.shard(tokens), trainer.shard(lengths))[1] for tokens in (rows, garbage)
    )
    for name, value in once._asdict().items():
        np.testing.assert_allclose(value, getattr(again, name), rtol=1e-6, err_msg=name)
    assert int(once.expert_counts.sum()) == lengths.sum() * TINY["num_experts_per_tok"] * TINY["num_hidden_layers"]


@pytest.mark.full
def test_the_loss_falls_by_two_nats_in_thirty_steps(tmp_path):
    """From ln 300 = 5.7 for a text of two repeated lines; every expert is used."""
    trainer = Trainer(tiny_model(tmp_path, mesh_of(2, 2, 2)), RECIPE)
    batches, held_out = tiny_text()
    state = trainer.init()
    before, _ = evaluate(trainer, state, held_out)
    losses, counts = [], 0
    for step in range(RECIPE.steps):
        state, metrics = trainer.step(state, trainer.shard(batches[step]))
        losses.append(float(metrics.loss))
        counts += np.asarray(metrics.expert_counts)
    after, held_out_counts = evaluate(trainer, state, held_out)
    assert np.mean(losses[-3:]) < losses[0] - 2
    assert after < before - 2
    assert counts.min() > 0
    assert held_out_counts.sum() == held_out.lengths.sum() * TINY["num_experts_per_tok"] * TINY["num_hidden_layers"]


def test_steps_that_end_in_the_warm_up_are_refused():
    with pytest.raises(ValueError, match="warms up for 100 steps; got steps=100: take more"):
        Recipe(steps=100)


@pytest.mark.full
def test_norms_do_not_decay(tmp_path):
    """With no gradient, weight decay moves matrices only."""
    trainer = Trainer(tiny_model(tmp_path, mesh_of(1, 1, 1)), RECIPE)
    state = trainer.init()
    zero = jax.tree.map(jnp.zeros_like, state.params)
    optimizer = state.optimizer
    for _ in range(2):
        updates, optimizer = trainer.optimizer.update(zero, optimizer, state.params)
    for path, update in updates.items():
        moved = bool(jnp.any(update != 0))
        assert moved == (state.params[path].ndim > 1), path


@pytest.mark.full
@pytest.mark.parametrize("dispatch", ["all_to_all"])
def test_another_dispatch_gives_the_same_step(tmp_path, dispatch):
    batches, _ = tiny_text()
    norms = []
    for name in ("replicated", dispatch):
        trainer = Trainer(tiny_model(tmp_path, mesh_of(2, 2, 2), dispatch=name), RECIPE)
        _, metrics = trainer.step(trainer.init(), trainer.shard(batches[0]))
        norms.append(float(metrics.gradient_norm))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
