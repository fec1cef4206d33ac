"""`jaxmoe.load(router=...)`: experts chosen by a function of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.config import RouterConfig
from jaxmoe.layers.router import RouterWeights, choose_experts
from jaxmoe.models import Decoder
from tests.support.goldens import GOLDENS, check_logits, read_expected
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering

CHECKPOINT = GOLDENS / "qwen3_moe" / "original"


def as_the_family_does(logits_TE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    return choose_experts(logits_TE, RouterWeights(w_router=None), k, RouterConfig())


def the_worst(logits_TE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    ids_TK = jax.lax.top_k(-logits_TE, k)[1]
    return ids_TK, jnp.full(ids_TK.shape, 1 / k)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_the_familys_own_router_as_a_function_changes_nothing(shape):
    model = jaxmoe.load(CHECKPOINT, mesh=mesh_of(*shape), placement="round_robin", router=as_the_family_does)
    check_logits(model, read_expected("qwen3_moe"))


@pytest.mark.full
def test_another_function_sends_tokens_to_other_experts():
    tokens, lengths = np.full((2, 16), 7, np.int32), np.full(2, 16, np.int32)
    models = [jaxmoe.load(CHECKPOINT, mesh=mesh_of(1, 1, 2), router=router) for router in (None, the_worst)]
    logits_and_stats = nnx.jit(Decoder.logits_and_stats)
    (_, usual), (_, other) = (logits_and_stats(model, tokens, lengths) for model in models)
    # In the first layer, where all have seen the same, no expert is both among the best and among the worst.
    assert not (np.asarray(usual[0].expert_counts, bool) & np.asarray(other[0].expert_counts, bool)).any()
    assert [int(stats.expert_counts.sum()) for stats in other] == [2 * 16 * 3] * 2
    prompt, greedy = (read_expected("qwen3_moe")[kind][0].tolist() for kind in ("prompt", "greedy"))
    (out,) = jaxmoe.generate(models[1], [prompt], max_new_tokens=8, ignore_eos=True)
    assert out.token_ids != greedy[:8]


def test_a_function_is_part_of_a_layers_config():
    config = jaxmoe.MoEConfig(
        num_experts=6,
        num_experts_per_tok=2,
        hidden_size=8,
        moe_intermediate_size=4,
        router=RouterConfig(function=the_worst),
    )
    layer = jaxmoe.MoE(config, mesh=mesh_of(2, 1, 2), rngs=nnx.Rngs(0))
    x_TD = jax.random.normal(jax.random.key(0), (5, 8))
    _, stats = layer(x_TD)
    expected = jax.lax.top_k(-(x_TD @ layer.w_router[...].T), 2)[1]
    np.testing.assert_array_equal(np.asarray(stats.expert_ids), np.asarray(expected))
