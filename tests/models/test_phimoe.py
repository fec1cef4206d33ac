"""Phi-3.5-MoE beyond its original context, where rotated queries and keys have another scale."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.models import Decoder
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering

CONTEXT = 10
SHORT, LONG = 1.2, 1.4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The golden model with a context of 10 tokens, and two in which one of its scales is everywhere."""
    loaded = {}
    for name, scales in {"own": (SHORT, LONG), "short": (SHORT, SHORT), "long": (LONG, LONG)}.items():
        directory = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(GOLDENS / "phimoe" / "original", directory)
        config = json.loads((directory / "config.json").read_text())
        config["rope_parameters"] |= {"short_mscale": scales[0], "long_mscale": scales[1]}
        # transformers writes it in both places.
        config["rope_parameters"]["original_max_position_embeddings"] = CONTEXT
        config["original_max_position_embeddings"] = CONTEXT
        (directory / "config.json").write_text(json.dumps(config))
        loaded[name] = jaxmoe.load(directory, mesh=mesh_of(1, 2, 2))
    return loaded


def tokens(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 97, (2, 24), dtype=np.int32)[:, :length]


def largest_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max()


@pytest.mark.full
@pytest.mark.parametrize(("length", "scale"), [(CONTEXT, "short"), (CONTEXT + 1, "long"), (24, "long")])
def test_the_length_of_a_prompt_gives_the_scale_of_all_its_positions(models, length, scale):
    prompt = tokens(length)
    other = {"short": "long", "long": "short"}[scale]
    assert largest_difference(models["own"](prompt), models[scale](prompt)) < 1e-6
    assert largest_difference(models["own"](prompt), models[other](prompt)) > 1e-3


@pytest.mark.full
def test_a_sequence_that_grows_keeps_its_cache_and_has_the_long_scale_from_then_on(models):
    prefill, decode = nnx.jit(Decoder.prefill), nnx.jit(Decoder.decode)
    prompt, lengths = tokens(CONTEXT - 1), np.full(2, CONTEXT - 1, np.int32)
    rest = tokens(CONTEXT + 3)[:, CONTEXT - 1 :]
    _, cache = prefill(models["own"], prompt, lengths, models["own"].init_cache(2, 16))
    _, expected_cache = prefill(models["short"], prompt, lengths, models["short"].init_cache(2, 16))
    for i, token in enumerate(rest.T):
        position = np.full(2, CONTEXT - 1 + i, np.int32)
        # The tenth token, at position 9, is the last one within the context.
        scale = "short" if i == 0 else "long"
        logits, cache = decode(models["own"], token, position, cache)
        expected, expected_cache = decode(models[scale], token, position, expected_cache)
        assert largest_difference(logits, expected) < 1e-6
    assert largest_difference(logits, models["own"](tokens(CONTEXT + 3))[:, -1]) > 1e-3
