"""The same checks as the goldens, live against transformers, with other sizes and seeds."""

import pytest

from tests.conftest import mesh_of
from tests.families import FAMILIES

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="live parity needs torch and transformers: scripts/test --parity")
pytest.importorskip("transformers", reason="live parity needs torch and transformers: scripts/test --parity")

import jaxmoe  # noqa: E402
from scripts.make_goldens import make_model, make_prompts, reference, save_forms  # noqa: E402
from tests.models.test_goldens import check_greedy, check_logits  # noqa: E402

EXPERTS_KEY = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts"}


@pytest.fixture(scope="module", params=[(family, experts) for family in FAMILIES for experts in (8, 11)], ids=str)
def case(request, tmp_path_factory):
    """A saved model and what transformers computes with it."""
    family, experts = request.param
    directory = tmp_path_factory.mktemp(family)
    model = make_model(family, seed=experts, **{EXPERTS_KEY[family]: experts})
    save_forms(model, directory)
    loose = reference(model, make_prompts(model.config.vocab_size, seed=experts))
    count = len(loose) // 3
    return directory, {kind: [loose[f"{kind}_{i}"] for i in range(count)] for kind in ("prompt", "logits", "greedy")}


@pytest.mark.parametrize(
    ("mesh_shape", "placement", "form"),
    [
        ((1, 1, 1), "linear", "original"),
        ((1, 1, 1), "linear", "fused"),
        ((8, 1, 1), "linear", "fused"),
        ((1, 2, 4), "linear", "original"),
        ((1, 2, 4), "round_robin", "fused"),
        ((2, 2, 2), "linear", "fused"),
        ((2, 2, 2), "round_robin", "original"),
        ((1, 1, 8), "linear", "original"),
        ((1, 1, 8), "round_robin", "fused"),
    ],
    ids=str,
)
def test_logits_and_greedy_tokens(case, mesh_shape, placement, form):
    directory, expected = case
    model = jaxmoe.load(directory / form, mesh=mesh_of(*mesh_shape), placement=placement)
    check_logits(model, expected)
    check_greedy(model, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": False},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"mlp_only_layers": [0]},
        {"decoder_sparse_step": 2},
        {"use_sliding_window": True, "sliding_window": 6},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
        {"num_experts_per_tok": 11},
        {"hidden_act": "gelu_pytorch_tanh"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_a_config(changes, tmp_path):
    model = make_model("qwen3_moe", seed=3, **changes)
    save_forms(model, tmp_path)
    loose = reference(model, make_prompts(97, seed=3), new_tokens=16)
    expected = {kind: [loose[f"{kind}_{i}"] for i in range(5)] for kind in ("prompt", "logits", "greedy")}
    loaded = jaxmoe.load(tmp_path / "original", mesh=mesh_of(2, 2, 2))
    check_logits(loaded, expected)
    check_greedy(loaded, expected)
