"""Embeddings of n-grams: the rows that a hash of 64 bits gives, against Python's integers, and what is kept of a prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import NGramConfig
from jaxmoe.layers import NGrams, ParamFactory
from jaxmoe.layers.ngrams import hashed_rows
from jaxmoe.models import FAMILIES
from jaxmoe.models.checks import check_tp
from tests.support.families import FAMILIES as SIZES
from tests.support.meshes import mesh_of

END = 2
CONFIG = NGramConfig(
    ngram_size=4,
    heads=2,
    width=12,
    vocab_size=248320,
    least_rows=1_000_000,
    rows_multiple=128,
    seed=1234,
    place=1,
    end_token=END,
    conv_kernel_size=3,
    parts=5,
)


def test_rows_of_heads_are_the_next_primes():
    small = [NGramConfig(**{**vars(CONFIG), "least_rows": 20, "place": place}).head_rows for place in (0, 1)]
    assert small == [(23, 29, 31, 37, 41, 43), (47, 53, 59, 61, 67, 71)]
    assert CONFIG.rows % 128 == 0
    assert 0 <= CONFIG.rows - sum(CONFIG.head_rows) < 128
    assert all(factor % 2 and factor * CONFIG.vocab_size < 2**63 for factor in CONFIG.multipliers)


def test_rows_are_those_of_whole_numbers():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, CONFIG.vocab_size, (3, 40))
    tokens[rng.random(tokens.shape) < 0.2] = END
    before = np.full((3, 3), END)
    found = np.asarray(jax.jit(hashed_rows, static_argnums=2)(jnp.int32(tokens), jnp.int32(before), CONFIG))
    for row, at in np.ndindex(tokens.shape):
        history = [END] * 3 + tokens[row, : at + 1].tolist()
        start = 0
        for head, size in enumerate(CONFIG.head_rows):
            ngram = history[-1:]
            for back in range(1, head // CONFIG.heads + 2):
                ended = END in history[-1 - back : -1]
                ngram.append(END if ended else history[-1 - back])
            mixed = 0
            for token, factor in zip(ngram, CONFIG.multipliers, strict=False):
                mixed ^= token * factor
            assert found[row, at, head] == start + mixed % size
            start += size
    # The rest of a row from what was kept of its beginning.
    later = hashed_rows(jnp.int32(tokens[:, 7:]), jnp.int32(tokens[:, 4:7]), CONFIG)
    np.testing.assert_array_equal(later, found[:, 7:])


def test_steps_after_a_prompt_are_one_long_prompt_on_every_rank():
    config = NGramConfig(**{**vars(CONFIG), "vocab_size": 97, "least_rows": 20})
    rng = np.random.default_rng(1)
    tokens, x = rng.integers(0, 9, (2, 14)), jnp.float32(rng.normal(size=(2, 14, 3, 5)))

    def run(tp: int, split: int) -> np.ndarray:
        ngrams = NGrams(config, 3, 5, 1e-3, param=ParamFactory(mesh_of(1, tp, 1), jnp.float32, nnx.Rngs(0)))
        cache = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype or "float32"), ngrams.cache_arrays(2))
        # Padded on the right, as prompts are.
        padded = np.pad(tokens[:, :split], ((0, 0), (0, 2)))
        positions = np.minimum(np.arange(split + 2), split - 1)[None].repeat(2, 0)
        y, cache = jax.jit(lambda x, cache: ngrams(x, jnp.int32(padded), positions, cache, ()))(
            x[:, : split + 2], cache
        )
        outputs = [y[:, :split]]
        step = jax.jit(lambda x, token, at, cache: ngrams(x, token, at, cache, (), decode=True))
        for at in range(split, 12):
            y, cache = step(x[:, at : at + 1], jnp.int32(tokens[:, at : at + 1]), jnp.full((2, 1), at), cache)
            outputs.append(y)
        return np.concatenate(outputs, axis=1)

    np.testing.assert_allclose(run(2, 5), run(1, 12), atol=1e-5)


def test_a_table_is_split_evenly_over_ranks():
    config = FAMILIES["qwen4_exp_text"].read_config(
        {"model_type": "qwen4_exp_text", **SIZES["qwen4_exp_text"], "make_ngram_vocab_size_divisible_by": 1}
    )
    rows = config.layers[0].ngrams.rows
    assert rows == 23 + 29 + 31 + 37 == 120
    with pytest.raises(ValueError, match="tp=16 does not divide"):
        check_tp(config, 16, ("ep",))
