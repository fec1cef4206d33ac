"""What a config refuses when it is made, at the last size that it takes and the first that it does not."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.config import (
    AttentionConfig,
    Chunks,
    DecoderConfig,
    GatedDeltaNetConfig,
    GroupedTopK,
    LayerConfig,
    Mamba2Config,
    MLAConfig,
    MLPConfig,
    MoEConfig,
    QueryKeyNorm,
    RouterConfig,
    SlidingWindow,
)
from jaxmoe.models.checks import check_token_ids

CHOICE = GroupedTopK(num_groups=4, topk_groups=2)
ROUTER = RouterConfig(choice=CHOICE)
MLP = MLPConfig(hidden_size=8, intermediate_size=6)
MOE = MoEConfig(
    num_experts=8, num_experts_per_tok=2, hidden_size=8, moe_intermediate_size=6, router=RouterConfig(choice=CHOICE)
)
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, rope=None)
DELTA = GatedDeltaNetConfig(num_key_heads=2, num_value_heads=4, key_head_dim=4, value_head_dim=4, conv_kernel_size=4)
MLA = MLAConfig(
    num_heads=2, kv_rank=4, q_rank=None, nope_head_dim=4, v_head_dim=4, rope=None, shared_key_dim=2, scale=1.0
)
MAMBA2 = Mamba2Config(num_heads=4, head_dim=4, num_groups=2, state_size=4, conv_kernel_size=4)
LAYER = LayerConfig(attention=ATTENTION, feed_forward=MOE)
DECODER = DecoderConfig(
    model_type="mixtral",
    vocab_size=10,
    hidden_size=8,
    layers=(LAYER,),
    norm_eps=1e-6,
    tie_word_embeddings=False,
    max_position_embeddings=16,
)


@pytest.mark.parametrize(
    ("config", "allowed", "refused", "message"),
    [
        (MOE, {"num_experts_per_tok": 8}, {"num_experts_per_tok": 9}, "at most all experts: num_experts_per_tok=9"),
        (MOE, {"num_experts": 12}, {"num_experts": 10}, "num_experts=10 is no multiple of num_groups=4"),
        (MOE, {"latent_size": 3, "latent_bias": True}, {"latent_bias": True}, "latent_norm_eps are of the projections"),
        (MOE, {"moe_intermediate_size": 1}, {"moe_intermediate_size": 0}, "at least 1; got 0"),
        (MLP, {"intermediate_size": 1}, {"intermediate_size": True}, "at least 1; got True"),
        (MLP, {"hidden_size": 1}, {"hidden_size": 8.0}, r"at least 1; got 8\.0"),
        (CHOICE, {"topk_groups": 4}, {"topk_groups": 5}, "topk_groups=5 is above num_groups=4"),
        (ATTENTION, {"num_kv_heads": 4}, {"num_kv_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        (QueryKeyNorm(weight="zero_centered"), {"over": "head"}, {"over": "full"}, "weight='zero_centered'"),
        (SlidingWindow(size=2), {"size": 1}, {"size": 0}, "at least 1; got 0"),
        (Chunks(size=2), {"size": 1}, {"size": 1.5}, r"at least 1; got 1\.5"),
        (DELTA, {"num_value_heads": 2}, {"num_value_heads": 3}, "num_value_heads=3 is no multiple of num_key_heads=2"),
        (MLA, {"shared_key_dim": 1}, {"shared_key_dim": None}, "shared_key_dim says how many there are; got rope=None"),
        (MAMBA2, {"num_groups": 4}, {"num_groups": 3}, "num_heads=4 is no multiple of num_groups=3"),
        (LAYER, {"attention": None}, {"attention": None, "feed_forward": None}, "or both; got neither"),
        (LAYER, {"parallel_mlp": MLP}, {"parallel_mlp": MLP, "feed_forward": MLP}, "beside routed experts"),
        (DECODER, {"layers": (LAYER,) * 3}, {"layers": ()}, "at least one layer; got none"),
        (
            DECODER,
            {"lm_head_bias": True},
            {"lm_head_bias": True, "tie_word_embeddings": True},
            "a tied output projection has no bias",
        ),
    ],
)
def test_what_is_allowed_and_what_is_refused(config, allowed, refused, message):
    dataclasses.replace(config, **allowed)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **refused)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([[0, 10]], r"token ids are 0\.\.9; got 0\.\.10"),
        ([[-1, 9]], r"token ids are 0\.\.9; got -1\.\.9"),
        ([0, 9], r"integers \[batch, sequence\], at least one; got int64 \(2,\)"),
        ([[]], "at least one; got"),
        ([[1.0]], "got float64"),
    ],
)
def test_token_ids_that_an_embedding_would_clip(token_ids, message):
    check_token_ids(np.array([[0, 9]]), 10)
    with pytest.raises(ValueError, match=message):
        check_token_ids(np.array(token_ids), 10)
