"""DeepSeek-V2: latent attention, softmax router with experts in groups."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, RouterConfig, pick
from jaxmoe.models.deepseek import DEEPSEEK_TENSORS, check_setting, read_deepseek, read_mla
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a deepseek_v2 checkpoint.

    Raises:
        ValueError: it asks for another score or another choice of experts than the family has, or for weights
            divided by their sum.
    """
    if pick(config, "norm_topk_prob", default=False):
        raise ValueError(
            "norm_topk_prob is false in every released deepseek_v2 model, and what true means differs: transformers "
            "does not look at it, vLLM divides by the sum and scales, DeepSeek's first code divides and does not scale; "
            "set it to false for what transformers computes"
        )
    grouped = check_setting(config, "topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    return read_deepseek(
        config,
        attention=read_mla(config, interleaved=True),
        router=RouterConfig(
            score=check_setting(config, "scoring_func", "softmax"),
            renormalize=False,
            num_groups=pick(config, "n_group") if grouped else 1,
            topk_groups=pick(config, "topk_group") if grouped else 1,
            group_score="max",
            zero_other_groups=True,
            scale=float(pick(config, "routed_scaling_factor", default=1.0)),
        ),
        shared_experts=2,
        first_sparse=0,
        mlp_bias=pick(config, "mlp_bias", default=False),
    )


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    read_config=read_config,
    tensors=DEEPSEEK_TENSORS,
    experts=MLP_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
