"""Names of one tensor by each other, as adapters need them."""

import pytest

from jaxmoe.checkpoint.mapping import Spellings
from jaxmoe.models import FAMILIES

GRANITE = "model.layers.0.block_sparse_moe"
PUBLISHED, OURS = "layers.12.ffn.experts", "model.layers.12.mlp.experts"


@pytest.mark.parametrize(
    ("family", "name", "there"),
    [
        ("deepseek_v4", "model.layers.3.self_attn.q_b_proj.weight", "layers.3.attn.wq_b.weight"),
        ("deepseek_v4", "layers.3.attn.wq_b.weight", "model.layers.3.self_attn.q_b_proj.weight"),
        ("deepseek_v4", "model.embed_tokens.weight", "embed.weight"),
        ("deepseek_v4", f"{OURS}.7.w2.weight", f"{PUBLISHED}.7.w2.weight"),
        ("deepseek_v4", f"{PUBLISHED}.gate_up_proj", f"{OURS}.gate_up_proj"),
        (
            "granitemoe",
            "model.layers.0.block_sparse_moe.experts.gate_up_proj",
            "model.layers.0.block_sparse_moe.input_linear.weight",
        ),
        ("step3p5", "model.layers.4.mlp.experts.up_proj.weight", "model.layers.4.moe.up_proj.weight"),
        ("nemotron_h", "model.layers.5.mixer.in_proj.weight", "backbone.layers.5.mixer.in_proj.weight"),
    ],
)
def test_a_tensor_is_found_by_its_other_names(family, name, there) -> None:
    spellings = Spellings(FAMILIES[family])
    assert spellings.find(name, {there, "lm_head.weight"}) == there
    assert spellings.find(name, {name, there}) == name
    other_layer = there.replace("layers.", "layers.1")
    assert spellings.find(name, {other_layer} - {there}) == name


def test_a_half_is_not_the_tensor_of_both() -> None:
    """MiniMax-M3's gate and up are two tensors in one spelling and one in the other."""
    spellings = Spellings(FAMILIES["minimax_m3_vl_text"])
    both, gate = (f"model.layers.3.mlp.shared_experts.{part}_proj.weight" for part in ("gate_up", "gate"))
    apart = "model.layers.3.block_sparse_moe.shared_experts.gate_proj.weight"
    assert spellings.find(gate, {apart, both}) == apart
    assert spellings.find(gate, {both}) == gate
    assert spellings.find(both, {apart}) == both
