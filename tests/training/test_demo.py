"""The checkpoint, the traces and the card that ship in demo/."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tokenizers import Tokenizer

import jaxmoe
from jaxmoe.placement import RoutingTrace
from scripts._train import corpus
from scripts._train.baselines import NGramModel
from scripts._train.model import CONFIG
from scripts._train.result import TOKEN_WINDOWS
from tests.support.meshes import mesh_of

DEMO = Path(__file__).parents[2] / "demo"


def test_it_is_small_and_of_the_config_that_the_script_trains():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 16_000_000
    assert json.loads((DEMO / "config.json").read_text()) == CONFIG | {"dtype": "bfloat16"}
    assert Tokenizer.from_file(str(DEMO / "tokenizer.json")).get_vocab_size() == CONFIG["vocab_size"]


def test_it_predicts_modules_it_has_not_seen_better_than_a_5_gram_model():
    """On small modules of this Python that were held out, against n-grams of all that were not."""
    names = {"queue.py", "tabnanny.py", "secrets.py", "timeit.py", "stat.py"}
    documents = corpus.split(corpus.standard_library())
    unseen = [document for document in documents.held_out if document.name in names]
    assert len(unseen) == len(names)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    five_grams = NGramModel(corpus.encode(documents.train, tokenizer), 5, CONFIG["vocab_size"])
    stream = corpus.encode(unseen, tokenizer)
    rows, _ = corpus.windows(stream, 384)
    whole = rows[:-1]  # the last is padded
    model = jaxmoe.load(DEMO, mesh=mesh_of(2, 2, 2), dtype="float32")
    nats = optax.softmax_cross_entropy_with_integer_labels(model(whole[:, :-1]), whole[:, 1:])
    assert float(jnp.sum(nats)) / math.log(2) < 0.95 * five_grams.bits(stream[: whole.size - len(whole) + 1])


@pytest.mark.parametrize("name", ["first_half", "second_half"])
def test_every_expert_is_used_and_no_layer_routes_by_chance(name):
    trace = RoutingTrace.load(DEMO / "traces" / f"{name}.npz")
    E = CONFIG["num_local_experts"]
    assert trace.counts.shape[1:] == (CONFIG["num_hidden_layers"], E)
    assert trace.num_windows >= 40
    relative = trace.total_counts / trace.total_counts.mean(axis=1, keepdims=True)
    assert relative.min() > 0
    assert relative.max() < 3
    # Windows differ by far more than the choices of so many tokens would at random.
    share = trace.counts / trace.counts.sum(axis=2, keepdims=True)
    by_chance = 1 / math.sqrt(trace.counts.sum(axis=2).mean() * E)
    assert (share.std(axis=0).mean(axis=1) > 2 * by_chance).all()

    tokens = RoutingTrace.load(DEMO / "traces" / f"{name}_tokens.npz")
    assert tokens.num_windows == TOKEN_WINDOWS
    np.testing.assert_array_equal(tokens.counts, trace.counts[:TOKEN_WINDOWS])
