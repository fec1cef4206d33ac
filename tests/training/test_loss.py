"""The loss of a batch is the mean over its tokens."""

import jax
import numpy as np
import pytest

from scripts._train.step import Trainer
from tests.support.meshes import mesh_of
from tests.support.tiny_training import RECIPE, tiny_model, tiny_text


def test_every_token_counts_alike_and_padding_not_at_all(tmp_path):
    trainer = Trainer(tiny_model(tmp_path, mesh_of(1, 1, 1)), RECIPE)
    params, rows = trainer.init().params, tiny_text()[0][0]
    loss = jax.jit(lambda lengths: trainer.loss(params, trainer.shard(rows), lengths)[1].loss)
    lengths = np.array([24, 3, 0, 24, 1, 9, 24, 0], np.int32)
    alone = [float(loss(np.where(np.arange(8) == row, lengths, 0))) for row in np.flatnonzero(lengths)]
    assert float(loss(lengths)) == pytest.approx(np.average(alone, weights=lengths[lengths > 0]), rel=1e-5)
    assert np.mean(alone) == pytest.approx(np.log(300), rel=0.1), (
        "random weights give every token of 300 the same chance"
    )
