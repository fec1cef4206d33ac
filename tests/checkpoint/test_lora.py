"""LoRA adapters: against a dense computation of PEFT's formulae, and against PEFT where it is installed."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from jaxmoe.checkpoint.boxes import whole
from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.lora.config import LoraConfig, parse_lora_config, read_lora_config
from jaxmoe.checkpoint.lora.match import find_updates
from jaxmoe.checkpoint.lora.update import LowRankUpdate, TensorDelta, delta_weight

E, D, F, R = 11, 6, 4, 2
MODULE = "model.layers.0.mlp.experts"
CONFIG = LoraConfig(rank=R, alpha=3, target_parameters=("experts.gate_up_proj", "experts.down_proj"))

FUSED = {f"{MODULE}.gate_up_proj": (E, 2 * F, D), f"{MODULE}.down_proj": (E, D, F)}
TRANSPOSED = {f"{MODULE}.gate_up_proj": (E, D, 2 * F), f"{MODULE}.down_proj": (E, F, D)}
PER_EXPERT = {f"{MODULE}.{e}.{part}.weight": (F, D) for e in range(E) for part in ("gate_proj", "up_proj")} | {
    f"{MODULE}.{e}.down_proj.weight": (D, F) for e in range(E)
}

Shapes = dict[str, tuple[int, ...]]
Arrays = dict[str, np.ndarray]


def random(shapes: Shapes) -> Arrays:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def shapes(arrays: Arrays) -> Shapes:
    return {name: array.shape for name, array in arrays.items()}


def pair(module: str, out: int, inputs: int, rank: int = R) -> Shapes:
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": (rank, inputs), f"{prefix}.lora_B.weight": (out, rank)}


def deltas(config: LoraConfig, adapter: Arrays, tensors: Shapes, **options) -> Arrays:
    """Every changed tensor's whole update, checked to be the same when it is computed in parts."""
    updates = find_updates(config, shapes(adapter), tensors, **options)
    assert {name for update in updates for name in (update.a, update.b)} == set(adapter)
    rng = np.random.default_rng(1)
    result = {}
    for name in {update.target for update in updates}:
        own = [update for update in updates if update.target == name]
        result[name] = delta_weight(own, whole(tensors[name]), adapter)
        for _ in range(4):
            edges = [sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in tensors[name]]
            box = tuple((start, stop) for start, stop in edges)
            expected = result[name][tuple(slice(*edge) for edge in edges)]
            np.testing.assert_allclose(delta_weight(own, box, adapter), expected, rtol=1e-5, atol=1e-6)
    return result


def dense_fused(a: np.ndarray, b: np.ndarray, scale: float, equation: str) -> np.ndarray:
    """As ParamWrapper.get_delta_weight of PEFT."""
    return scale * np.einsum(equation, b.reshape(len(b), -1, E), a.reshape(E, -1, a.shape[-1]))


# Against the formulae.


def test_plain_module() -> None:
    name = "model.layers.0.self_attn.q_proj"
    adapter = random(pair(name, 8, D))
    found = deltas(LoraConfig(rank=R, alpha=3), adapter, {f"{name}.weight": (8, D), "other": (1, 1)})
    a, b = adapter.values()
    np.testing.assert_allclose(found[f"{name}.weight"], 1.5 * b @ a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["base_model.model.q.lora_{}.default.weight", "q.lora_{}.weight", "base_model.model.q.lora_{}"]
)
def test_names_of_factors(name: str) -> None:
    adapter = {name.format("A"): (R, 3), name.format("B"): (5, R)}
    (update,) = find_updates(LoraConfig(rank=R, alpha=R), adapter, {"q.weight": (5, 3)})
    assert (update.target, update.a, update.b) == ("q.weight", *adapter)


def test_scales() -> None:
    config = LoraConfig(rank=4, alpha=8, rank_pattern={"q_proj": 16, r".*\.1\.mlp\..*": 2}, alpha_pattern={"k_proj": 1})
    assert config.scale_of("layers.0.q_proj") == 8 / 16
    assert config.scale_of("layers.0.k_proj") == 1 / 4
    assert config.scale_of("layers.0.my_q_proj") == 8 / 4  # a pattern starts at a dot
    assert config.scale_of("layers.1.mlp.up_proj") == 8 / 2
    assert LoraConfig(rank=16, alpha=8, use_rslora=True).scale_of("q") == 2


def test_embedding_and_stored_transposed() -> None:
    names = {"base_model.model.embed.lora_embedding_A": (R, 9), "base_model.model.embed.lora_embedding_B": (D, R)}
    adapter = random(names)
    a, b = adapter.values()
    found = deltas(LoraConfig(rank=R, alpha=R), adapter, {"embed.weight": (9, D)})
    np.testing.assert_allclose(found["embed.weight"], (b @ a).T, rtol=1e-5, atol=1e-6)
    adapter = random(pair("c_attn", 9, D))
    a, b = adapter.values()
    found = deltas(LoraConfig(rank=R, alpha=R, fan_in_fan_out=True), adapter, {"c_attn.weight": (D, 9)})
    np.testing.assert_allclose(found["c_attn.weight"], (b @ a).T, rtol=1e-5, atol=1e-6)


def fused_adapter(in_out: bool) -> Arrays:
    """Factors of gate_up_proj (the inner wrapper) and down_proj, of rank R for each expert."""
    # (out, in) of each; read as [E, in, out], a parameter's rows are the inputs.
    sizes = [(D, 2 * F), (F, D)] if in_out else [(2 * F, D), (D, F)]
    return random(pair(f"{MODULE}.base_layer", *sizes[0], R * E) | pair(MODULE, *sizes[1], R * E))


@pytest.mark.parametrize("in_out", [False, True], ids=["out,in", "in,out"])
@pytest.mark.parametrize("tensors", [FUSED, PER_EXPERT], ids=["fused", "per expert"])
def test_fused_parameters(tensors: Shapes, in_out: bool) -> None:
    """Both readings of [E, 2F, D], on a checkpoint that has it and on one with a tensor for each expert."""
    adapter = fused_adapter(in_out)
    a0, b0, a1, b1 = adapter.values()
    equation = "ore,eri->eio" if in_out else "ore,eri->eoi"
    gate_up, down = dense_fused(a0, b0, 1.5, equation), dense_fused(a1, b1, 1.5, equation)
    found = deltas(CONFIG, adapter, tensors)
    assert set(found) == set(tensors)
    for name, delta in found.items():
        if tensors is FUSED:
            expected = gate_up if "gate_up" in name else down
        else:
            expert, part = int(name.split(".")[5]), name.split(".")[6]
            expected = {"gate_proj": gate_up[expert, :F], "up_proj": gate_up[expert, F:], "down_proj": down[expert]}[
                part
            ]
        np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_fused_parameters_of_a_transposed_checkpoint() -> None:
    adapter = random(pair(f"{MODULE}.base_layer", 2 * F, D, R * E) | pair(MODULE, D, F, R * E))
    a0, b0, a1, b1 = adapter.values()
    found = deltas(CONFIG, adapter, TRANSPOSED)
    for name, a, b in [("gate_up_proj", a0, b0), ("down_proj", a1, b1)]:
        expected = dense_fused(a, b, 1.5, "ore,eri->eio")
        np.testing.assert_allclose(found[f"{MODULE}.{name}"], expected, rtol=1e-4, atol=1e-5)


def test_one_of_two_parameters() -> None:
    for parameter, (out, inputs) in {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}.items():
        config = LoraConfig(rank=R, alpha=1, target_parameters=(f"mlp.experts.{parameter}",))
        assert set(deltas(config, random(pair(MODULE, out, inputs, R * E)), FUSED)) == {f"{MODULE}.{parameter}"}


def test_shapes_decide_where_wrappers_are_in_another_order() -> None:
    adapter = random(pair(f"{MODULE}.base_layer", D, F, R * E) | pair(MODULE, 2 * F, D, R * E))
    updates = find_updates(CONFIG, shapes(adapter), FUSED)
    assert {u.a for u in updates if "down" in u.target} == {f"base_model.model.{MODULE}.base_layer.lora_A.weight"}


@pytest.mark.parametrize("tensors", [FUSED, PER_EXPERT], ids=["fused", "per expert"])
def test_modules_of_single_experts(tensors: Shapes) -> None:
    sizes = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    adapted = [(10, "gate_proj"), (9, "up_proj"), (1, "up_proj"), (10, "down_proj")]
    adapter = random({k: v for e, part in adapted for k, v in pair(f"{MODULE}.{e}.{part}", *sizes[part]).items()})
    found = deltas(LoraConfig(rank=R, alpha=3), adapter, tensors)
    for expert, part in adapted:
        a, b = (adapter[f"base_model.model.{MODULE}.{expert}.{part}.lora_{side}.weight"] for side in "AB")
        if tensors is PER_EXPERT:
            delta = found[f"{MODULE}.{expert}.{part}.weight"]
        else:
            whole_expert = found[f"{MODULE}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"][expert]
            delta = {"gate_proj": whole_expert[:F], "up_proj": whole_expert[F:], "down_proj": whole_expert}[part]
        np.testing.assert_allclose(delta, 1.5 * b @ a, rtol=1e-5, atol=1e-6)
    if tensors is FUSED:  # and nothing else changed
        assert not found[f"{MODULE}.gate_up_proj"][[0, 2, 3, 8]].any()
    updates = find_updates(LoraConfig(rank=R, alpha=3), shapes(adapter), tensors)
    assert sorted(update.expert for update in updates) == [1, 9, 10, 10]


def test_names_on_disk_may_differ() -> None:
    """Mixtral's parameter is mlp.experts.gate_up_proj in transformers; its files have block_sparse_moe.experts.0.w1."""
    disk = {
        name.replace("mlp", "block_sparse_moe")
        .replace("gate_proj", "w1")
        .replace("up_proj", "w3")
        .replace("down_proj", "w2"): shape
        for name, shape in PER_EXPERT.items()
    }
    updates = find_updates(
        CONFIG, shapes(fused_adapter(False)), disk, rename=lambda n: n.replace(".mlp.", ".block_sparse_moe.")
    )
    assert {update.target for update in updates} == set(disk)


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "must be of peft_type LORA to be merged; this one is of 'LOHA'"),
        ({"use_dora": True}, "this one has use_dora: DoRA scales each output"),
        ({"layer_replication": [[0, 2]]}, "this one has layer_replication"),
        ({"trainable_token_indices": [1]}, "this one has trainable_token_indices"),
        ({"lora_bias": True}, "this one has lora_bias"),
        ({"bias": "all"}, "must not train biases; this one has bias='all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "save it with path_initial_model_for_weight_conversion"),
        ({"r": 0}, "must have a rank r and a lora_alpha; this one has 0 and 16"),
        ({"r": True}, "must have a rank"),
        ({"lora_alpha": "16"}, "must have a rank"),
        ({"rank_pattern": {"q": "8"}}, "rank_pattern must map names to numbers"),
        ({"rank_pattern": {"(": 8}}, "must be a regular expression"),
        ({"rank_pattern": {"a{99999999999999999999}": 8}}, "must be a regular expression"),
        ({"rank_pattern": {"(" * 10_000 + ")" * 10_000: 8}}, "must be a regular expression"),
        ({"rank_pattern": {r"((\w|\.)+)+!": 8}}, "matched in short time: no repeated groups"),
        ({"alpha_pattern": {".*.*.*.*!": 8}}, "matched in short time: .* at most 3 quantifiers"),
        ({"alpha_pattern": {"a?" * 30 + "a" * 30: 8}}, "matched in short time"),
        ({"target_parameters": "experts"}, "must be a list of names"),
    ],
)
def test_configurations_that_are_refused(changes: dict, message: str) -> None:
    document = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "init_lora_weights": "gaussian"}
    assert parse_lora_config(document) == LoraConfig(rank=8, alpha=16)
    with pytest.raises(CheckpointError, match=message):
        parse_lora_config(document | changes)


def test_patterns_as_people_write_them_are_read() -> None:
    patterns = {r"^model\.layers\.(1[0-9]|2[0-3])\..*\.q_proj": 4, r"(?:.*\.)?experts\.\d+\.up_proj": 2, "k_proj": 1}
    document = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": patterns}
    assert parse_lora_config(document).rank_of("model.layers.23.self_attn.q_proj") == 4


def test_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    for content, message in [
        (b"[]", "must be a JSON object"),
        (b"{", "must be JSON"),
        (b"\xff", "must be UTF-8"),
        (b"{}", "LORA"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            read_lora_config(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "adapter", "message"),
    [
        ({}, {"q.lora_magnitude_vector": (5,)}, r"neither \(DoRA\); merge it with PEFT"),
        ({}, {"q.weight": (5, 3)}, "are lora_A and lora_B of its modules; 'q.weight' is neither"),
        ({}, {"q.lora_A.weight": (R, 3)}, "come in pairs; of 'q' there is 'q.lora_A.weight' only"),
        ({}, {"q.lora_A.weight": (R, 3), "q.lora_A.x.weight": (R, 3)}, "are for the same"),
        ({}, {"q.lora_A.weight": (R, 3, 1, 1), "q.lora_B.weight": (5, R)}, r"lora_A is \[rank, in\]"),
        ({}, {"q.lora_A.weight": (R, 3), "q.lora_B.weight": (5, R + 1)}, r"lora_A is \[rank, in\]"),
        (
            {"rank": 4},
            {"q.lora_A.weight": (R, 3), "q.lora_B.weight": (5, R)},
            "gives 'q' the rank 4; 'q.lora_A.weight'",
        ),
        ({}, {"q.lora_A.weight": (R, 4), "q.lora_B.weight": (5, R)}, r"has \(5, 4\), and 'q.weight' has \(5, 3\)"),
        ({}, pair("k", 5, 3), "'k.weight' is not; the nearest is 'q.weight'; is the adapter for this model"),
        ({}, pair(MODULE, D, F, R * E), "list all target_parameters"),
        ({}, pair(f"{MODULE}.11.up_proj", F, D), "adapts expert 11; .* has 11 experts"),
        ({}, pair(f"{MODULE}.1.up_proj", F + 1, D), "fused experts of D=6 and F=5 are"),
        ({}, pair(f"{MODULE}.1.other", F, D), "'model.layers.0.mlp.experts.1.other.weight' is not; the nearest"),
        (
            {"target_parameters": ("experts.down_proj", "experts.gate_up_proj")},
            pair(MODULE, D, F, R * E),
            "gate_up_proj, down_proj of .* needs a pair of factors; there are 1",
        ),
        ({"target_parameters": ("experts.down_proj",)}, pair(MODULE, D, F + 1, R * E), "the factors must fit"),
        ({"target_parameters": ("experts.down_proj",)}, pair(MODULE, D, F, R * 4), "the rank 2 for each of 11 experts"),
        ({"target_parameters": ("experts.bias",)}, pair(MODULE, D, F, R * E), "or its experts one by one, must be in"),
        ({"target_parameters": ("s.experts.square",)}, pair("s.experts", 5, 5, R * 3), "of 's.experts' are square"),
    ],
)
def test_adapters_that_are_refused(config: dict, adapter: Shapes, message: str) -> None:
    tensors = {"q.weight": (5, 3), "s.experts.square": (3, 5, 5)} | FUSED
    with pytest.raises(CheckpointError, match=message):
        find_updates(LoraConfig(**({"rank": R, "alpha": 1} | config)), adapter, tensors)


@pytest.mark.parametrize("joined", [False, True])
def test_gate_and_up_in_one_matrix_or_in_two(joined: bool) -> None:
    """Of a dense MLP the adapter has the one and the checkpoint the other."""
    both, halves = "mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")
    adapter = random(pair(both, 2 * F, D)) if joined else random({**pair(halves[0], F, D), **pair(halves[1], F, D)})
    tensors = dict.fromkeys((f"{name}.weight" for name in halves), (F, D)) if joined else {f"{both}.weight": (2 * F, D)}
    found = deltas(LoraConfig(rank=R, alpha=3), adapter, tensors)
    a, b = list(adapter.values())[::2], list(adapter.values())[1::2]
    expected = np.concatenate([1.5 * b @ a for a, b in zip(a, b, strict=True)])
    assert found.keys() == tensors.keys()
    np.testing.assert_allclose(np.concatenate([found[name] for name in tensors]), expected, rtol=1e-5, atol=1e-6)
    for wrong in (
        {**tensors, next(iter(tensors)): (F + 1, D)},
        {name: (*shape[:1], D + 1) for name, shape in tensors.items()},
    ):
        with pytest.raises(CheckpointError, match="the rows of gate, of up, or of both"):
            find_updates(LoraConfig(rank=R, alpha=3), shapes(adapter), wrong)


# Against PEFT.


def merged_by_peft(model, tmp_path: Path, **config) -> tuple[LoraConfig, Arrays, Arrays, Arrays]:
    """Adapt `model`, save the adapter, merge it: configuration and factors as read, weights before and after."""
    import peft
    import torch
    from safetensors.numpy import load_file

    torch.manual_seed(0)
    before = {name: tensor.detach().clone().numpy() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **config))
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)
        merged = adapted.merge_and_unload()
    after = {name: tensor.detach().numpy() for name, tensor in merged.state_dict().items()}
    return (
        read_lora_config(tmp_path / "adapter_config.json"),
        load_file(tmp_path / "adapter_model.safetensors"),
        before,
        after,
    )


def toy(experts: str):
    """A model with attention, an embedding and experts as single modules, or as parameters of all."""
    import torch
    from torch import nn

    torch.manual_seed(1)

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj = nn.Linear(D, F, bias=False)
            self.up_proj = nn.Linear(D, F, bias=False)
            self.down_proj = nn.Linear(F, D, bias=False)

    class Experts(nn.Module):
        def __init__(self, transposed: bool) -> None:
            super().__init__()
            self.is_transposed = transposed
            tensors = TRANSPOSED if transposed else FUSED
            self.gate_up_proj = nn.Parameter(torch.randn(tensors[f"{MODULE}.gate_up_proj"]))
            self.down_proj = nn.Parameter(torch.randn(tensors[f"{MODULE}.down_proj"]))

    layer = nn.Module()
    layer.self_attn = nn.Module()
    layer.self_attn.q_proj = nn.Linear(D, 8, bias=False)
    layer.self_attn.k_proj = nn.Linear(D, 4, bias=False)
    layer.mlp = nn.Module()
    layer.mlp.experts = (
        nn.ModuleList([Expert() for _ in range(E)]) if experts == "modules" else Experts(experts == "transposed")
    )
    model = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = nn.Embedding(9, D)
    model.model.layers = nn.ModuleList([layer])
    return model


ATTENTION = ["q_proj", "k_proj"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    ("experts", "config"),
    [
        pytest.param("modules", {"target_modules": ATTENTION}, id="attention"),
        pytest.param(
            "modules", {"target_modules": [*ATTENTION, "up_proj", "down_proj"], "use_rslora": True}, id="rslora"
        ),
        pytest.param("modules", {"target_modules": ["embed_tokens", "gate_proj"]}, id="embedding"),
        pytest.param(
            "modules",
            {
                "target_modules": [*ATTENTION, "up_proj"],
                "rank_pattern": {"q_proj": 5, "experts.10.up_proj": 1},
                "alpha_pattern": {"k_proj": 7, "up_proj": 2},
            },
            id="patterns",
        ),
        pytest.param("fused", {"target_modules": ATTENTION, "target_parameters": BOTH}, id="both"),
        pytest.param("fused", {"target_modules": ATTENTION, "target_parameters": BOTH[:1]}, id="gate_up"),
        pytest.param("fused", {"target_modules": ATTENTION, "target_parameters": BOTH[1:]}, id="down"),
        pytest.param("transposed", {"target_modules": ATTENTION, "target_parameters": BOTH[::-1]}, id="transposed"),
        pytest.param(
            "fused",
            {
                "target_modules": ATTENTION,
                "target_parameters": BOTH,
                "rank_pattern": {"experts.gate_up_proj": 3},
                "alpha_pattern": {"experts.down_proj": 9},
            },
            id="patterns of parameters",
        ),
    ],
)
def test_merge_equals_pefts(tmp_path: Path, experts: str, config: dict) -> None:
    pytest.importorskip("peft")
    ours, adapter, before, after = merged_by_peft(toy(experts), tmp_path, r=2, lora_alpha=3, **config)
    found = deltas(ours, adapter, shapes(before))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert set(found) == changed
    for name in changed:
        np.testing.assert_allclose(before[name] + found[name], after[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_configuration_of_peft_is_read(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ours, *_ = merged_by_peft(
        toy("fused"), tmp_path, r=2, lora_alpha=3, target_modules=ATTENTION, target_parameters=BOTH
    )
    assert ours == LoraConfig(rank=2, alpha=3, target_parameters=tuple(BOTH))
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(CheckpointError, match="use_dora"):
        parse_lora_config(document | {"use_dora": True})


@pytest.mark.parametrize("dim_order", [None, (0, 3, 4, 1, 2)])
@pytest.mark.parametrize(
    "box",
    [
        ((1, 2), (0, 1), (1, 3), (0, 2), (1, 3)),
        ((1, 2), (1, 2), (0, 3), (1, 2), (0, 3)),
        ((0, 2), (0, 2), (1, 2), (0, 1), (2, 3)),
    ],
)
def test_the_delta_of_a_tensor_whose_dims_are_split(box, dim_order):
    rng = np.random.default_rng(0)
    factors = {"a": rng.standard_normal((2, 6), np.float32), "b": rng.standard_normal((6, 2), np.float32)}
    update = LowRankUpdate(
        target="w",
        box=((1, 2), (0, 6), (0, 6)),
        expert=1,
        a="a",
        b="b",
        rank_a=slice(0, 2),
        rank_b=slice(0, 2),
        scale=2,
    )
    whole = delta_weight([update], ((0, 2), (0, 6), (0, 6)), factors)
    assert whole is not None
    stored = dim_order or tuple(range(5))
    delta = TensorDelta((update,), factors, dim_order, ((2,), (2, 3), (2, 3)))
    expected = whole.reshape(2, 2, 3, 2, 3)[tuple(slice(*extent) for extent in box)].transpose(stored)
    actual = delta.of(tuple(box[dim] for dim in stored))
    np.testing.assert_allclose(np.zeros_like(expected) if actual is None else actual, expected, rtol=1e-5)
