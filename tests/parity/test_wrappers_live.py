"""Multimodal checkpoints live against transformers: text in, the text part's logits and tokens out."""

import numpy as np
import pytest

from tests.support import runs
from tests.support.families import FAMILIES, WRAPPERS
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.parity

pytest.importorskip("torch", reason="live parity needs torch and transformers: scripts/test --parity")
transformers = pytest.importorskip(
    "transformers", reason="live parity needs torch and transformers: scripts/test --parity"
)

import jaxmoe  # noqa: E402
from scripts.make_goldens import make_model, make_prompts, reference, save_forms  # noqa: E402
from tests.support.goldens import check_greedy, check_logits, check_same_parameters  # noqa: E402


def arrays_of(model, seed, new_tokens=1):
    loose = reference(model, make_prompts(97, seed=seed), new_tokens=new_tokens)
    return {kind: [loose[f"{kind}_{i}"] for i in range(len(loose) // 3)] for kind in ("prompt", "logits", "greedy")}


VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
TOKENS = {"image_token_id": 97, "video_token_id": 98, "tie_word_embeddings": False}
# Those of which nothing is stored.
SIZES = {
    "glm4v_moe": {
        "text_config": {
            **{key: value for key, value in FAMILIES["glm4_moe"].items() if key != "use_qk_norm"},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]},
        },
        "vision_config": {**VISION, "image_size": 8},
        **TOKENS,
    },
    "kimi_k25": {
        "text_config": {"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]},
        "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        **TOKENS,
    },
    "qwen3_omni_moe_thinker": WRAPPERS["qwen3_omni_moe"]["thinker_config"],
    "qwen3_5_moe": {
        "text_config": FAMILIES["qwen3_5_moe_text"],
        "vision_config": {**VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        "vision_start_token_id": 99,
        "vision_end_token_id": 100,
        **TOKENS,
    },
    "qwen4_exp": {
        "text_config": FAMILIES["qwen4_exp_text"],
        "vision_config": {**VISION, "num_position_embeddings": 16},
        "vision_start_token_id": 99,
        "vision_end_token_id": 100,
        **TOKENS,
    },
}


@pytest.mark.parametrize("name", [*WRAPPERS, *SIZES])
def test_logits_and_greedy_tokens(name, tmp_path):
    model = make_model(name, seed=7, **SIZES.get(name, {}))
    generates = runs.full and name in SIZES  # the others generate what is stored of transformers
    expected = arrays_of(model, seed=7, new_tokens=32 if generates else 1)
    save_forms(model, tmp_path)
    loaded = jaxmoe.load(tmp_path / "original", mesh=mesh_of(2, 2, 2))
    check_logits(loaded, expected)
    if generates:
        check_greedy(loaded, expected)
    if (tmp_path / "fused").is_dir():
        check_same_parameters(jaxmoe.load(tmp_path / "fused", mesh=mesh_of(2, 2, 2)), loaded)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "glm5_next",
            {
                "linear_lower_bound": None,
                "attention_bias": True,
                "norm_topk_prob": False,
                "n_routed_experts": 12,
                "n_group": 3,
                "topk_group": 2,
                "n_shared_experts": 2,
                "index_kpool": 2,
                "index_topk": 4,
            },
        ),
        (
            "glm5_next",
            {"layer_types": None, "indexer_types": None, "mlp_layer_types": None, "index_kpool": 1, "hc_mult": 2},
        ),
    ],
)
def test_other_settings_of_a_text_part(name, changes, tmp_path):
    """Of families whose text part transformers does not have alone, which `test_live` cannot compare."""
    sizes = {**WRAPPERS[name], "text_config": {**WRAPPERS[name]["text_config"], **changes}}
    model = make_model(name, seed=9, **sizes)
    expected = arrays_of(model, seed=9)
    model.save_pretrained(tmp_path)
    check_logits(jaxmoe.load(tmp_path, mesh=mesh_of(2, 2, 2)), expected)


# Those of which transformers has no class for the text part alone.
WHOLE = {"glm5_next", "step3p7"}


@pytest.mark.parametrize("name", sorted({*WRAPPERS, *SIZES} - WHOLE))
def test_transformers_loads_the_text_model_that_convert_writes(name, tmp_path):
    model = make_model(name, seed=8, **SIZES.get(name, {}))
    expected = arrays_of(model, seed=8)
    model.save_pretrained(tmp_path / "whole")
    jaxmoe.convert(tmp_path / "whole", tmp_path / "text")
    text, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = arrays_of(text.float().eval(), seed=8)
    for ours, theirs in zip(found["logits"], expected["logits"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
