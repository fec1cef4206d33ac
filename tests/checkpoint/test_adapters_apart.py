"""Adapters beside the weights: against models that they are merged into, by parameters, logits and text."""

import json

import jax
import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint import CheckpointError
from jaxmoe.checkpoint.mapping import FamilyCheckpoint
from jaxmoe.cli import main
from jaxmoe.generation.programs import programs_of
from jaxmoe.layers import adaptable_params, held_factors, param_specs, params_by_path
from tests.support import runs
from tests.support.adapters import Arrays, factors, params, write_adapter
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_id, mesh_of
from tests.support.rounding import CASES as ROUNDING
from tests.support.rounding import write_rounding

QWEN = GOLDENS / "qwen3_moe" / "original"
R, E, D, F = 2, 11, 32, 24
TOKENS = np.random.default_rng(7).integers(3, 90, (4, 7)).astype(np.int32)
# Of a mesh, the placement, the axes of the experts and the dispatch: each backend and both placements once.
CASES = (
    ((1, 1, 1), "linear", ("ep",), "auto"),
    ((2, 2, 2), "round_robin", ("ep",), "all_to_all"),
    ((1, 4, 2), "linear", ("ep", "tp"), "all_gather"),
    ((2, 1, 4), "round_robin", ("dp", "ep"), "replicated"),
)
FUSED = ["experts.gate_up_proj", "experts.down_proj"]
MLP = ("gate_proj", "up_proj", "down_proj")


def attention_adapter(rank: int = 3) -> Arrays:
    sizes = {"q_proj": (64, D), "v_proj": (16, D), "o_proj": (D, 64)}
    parts = [(f"model.layers.{layer}.self_attn.{part}", *size) for layer in range(2) for part, size in sizes.items()]
    return {name: value for part in parts for name, value in factors(*part, rank).items()}


def single_experts_adapter() -> Arrays:
    """Factors of some projections of some experts of layer 0."""
    chosen = ((0, 0), (3, 1), (9, 2), (10, 0), (10, 1), (10, 2))
    return {
        name: value
        for expert, part in chosen
        for name, value in factors(
            f"model.layers.0.mlp.experts.{expert}.{MLP[part]}", *((D, F) if part == 2 else (F, D))
        ).items()
    }


def all_experts_adapter() -> Arrays:
    """Factors of the fused parameters of all experts of layer 1."""
    module = "model.layers.1.mlp.experts"
    return factors(f"{module}.base_layer", 2 * F, D, R * E) | factors(module, D, F, R * E)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        "attention": write_adapter(root / "attention", attention_adapter(), r=3),
        "all experts": write_adapter(root / "all", all_experts_adapter(), target_parameters=FUSED),
        "some": write_adapter(root / "some", {**single_experts_adapter(), **attention_adapter(2)}),
    }


@pytest.fixture(scope="module")
def merged(adapters):
    """Logits of the base and of each merged model, of all rows, by one program."""
    model = jaxmoe.load(QWEN, mesh=mesh_of(1, 1, 1))
    logits, own = {None: np.asarray(model(TOKENS))}, params_by_path(model)
    for name, path in adapters.items():
        for param, values in params_by_path(jaxmoe.load(QWEN, mesh=model.mesh, adapter=path)).items():
            own[param].set_value(values.get_value())
        logits[name] = np.asarray(model(TOKENS))
    return logits


def check_rows(model, names, merged) -> None:
    """Each row has the logits of the model that its adapter is merged into."""
    logits = np.asarray(model(TOKENS, adapters=names))
    for row, name in enumerate(names):
        largest = np.abs(merged[name]).max()
        np.testing.assert_allclose(logits[row], merged[name][row], atol=1e-5 * largest, err_msg=str(name))


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{mesh_id(case[0])}-{case[3]}")
def test_rows_of_one_batch_have_the_logits_of_merged_models(case, adapters, merged) -> None:
    shape, placement, axes, dispatch = case
    mesh = mesh_of(*shape)
    model = jaxmoe.load(QWEN, mesh=mesh, adapters=adapters, placement=placement, expert_axes=axes, dispatch=dispatch)
    check_rows(model, [None, "all experts", "attention", "some"], merged)
    assert model.adapters == tuple(adapters)

    tp, slots = ("tp" if "tp" not in axes else None), model.moe_layers[0].placement.num_slots
    held = {path: factor.get_value() for path, factor in held_factors(model).items()}
    expected = {
        "layers.0.attention.w_q_lora_a": ((3, 3, D), (None, None, None)),
        "layers.0.attention.w_q_lora_b": ((64, 3, 3), ("tp", None, None)),
        "layers.0.attention.w_o_lora_a": ((3, 3, 64), (None, None, "tp")),
        # Single experts have a pair for gate and one for up, with a rank of 2 each.
        "layers.0.moe.w_gate_up_lora_a": ((slots, 3, 4, D), (axes, None, None, None)),
        "layers.0.moe.w_gate_up_lora_b": ((slots, 3, 2, F, 4), (axes, None, None, tp, None)),
        "layers.1.moe.w_down_lora_a": ((slots, 3, 2, F), (axes, None, None, tp)),
    }
    for path, (size, spec) in expected.items():
        assert held[path].shape == size
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert held[path].sharding.is_equivalent_to(sharding, len(size)), path
    per_device = {device.id: 0 for device in mesh.devices.flat}
    for array in held.values():
        for shard in array.addressable_shards:
            per_device[shard.device.id] += shard.data.nbytes
    assert model.load_report.adapter_bytes_per_device == per_device
    sizes = dict(zip(("dp", "tp", "ep"), shape, strict=True))
    plan = jaxmoe.plan(QWEN, **sizes, placement=placement, expert_axes=axes, adapters=adapters)
    assert plan.parts["adapters"].tolist() == list(per_device.values())
    assert model.load_report.adapters["some"].merged["model.layers.*.mlp.experts.*.up_proj.weight"] == 2


def test_adapters_come_and_go_and_move_with_the_experts(adapters, merged) -> None:
    model = jaxmoe.load(QWEN, mesh=mesh_of(1, 2, 4), placement=jaxmoe.ExpertPlacement.linear(E, 4, num_slots=16))
    jaxmoe.add_adapter(model, "some", adapters["some"], room=2, rank=3)
    prompts = TOKENS.tolist()

    def text(*names):
        outs = jaxmoe.generate(model, prompts, max_new_tokens=3, ignore_eos=True, adapters=names)
        assert [out.adapter for out in outs] == [*names]
        return [out.token_ids for out in outs]

    first = text(None, "some", None, "some")
    assert [ids[0] for ids in first] == [int(merged[n][i, -1].argmax()) for i, n in enumerate((None, "some") * 2)]
    if runs.full:
        plain = jaxmoe.generate(model, prompts, max_new_tokens=3, ignore_eos=True)
        assert [plain[row].token_ids for row in (0, 2)] == [first[0], first[2]]
    compiled = len(programs_of(model).compiled)

    # A free place, and places that have been left by others: the same programs serve them all.
    jaxmoe.add_adapter(model, "attention", adapters["attention"])
    assert [ids[0] for ids in text(*["attention"] * 4)] == merged["attention"][:, -1].argmax(-1).tolist()
    jaxmoe.remove_adapter(model, "some")
    jaxmoe.remove_adapter(model, "attention")
    jaxmoe.add_adapter(model, "attention", adapters["attention"])
    jaxmoe.add_adapter(model, "again", adapters["some"])
    assert text(None, "again", None, "again") == first
    assert len(programs_of(model).compiled) == compiled
    assert model.adapters == tuple(model.load_report.adapters) == ("attention", "again")

    merged = {**merged, "again": merged["some"]}
    names = ["again", "attention", None, "again"]
    counts = np.arange(E)[None].repeat(2, 0) + 1
    placements = [jaxmoe.ExpertPlacement.from_counts(row, ep=4, num_slots=16) for row in counts]
    assert model.rebalance(placements).total > 0
    check_rows(model, names, merged)
    if not runs.full:
        return
    # A third adapter, of another matrix, has no room: factors grow, and the first two stay.
    jaxmoe.add_adapter(model, "all experts", adapters["all experts"])
    moved = jaxmoe.move(model, mesh=mesh_of(1, 1, 2), placement="round_robin")
    assert moved.load_report.bytes_read == 0
    check_rows(moved, ["again", "attention", None, "all experts"], merged)
    # Half of the experts are lost: their factors are read from the adapters' directories.
    lost = [moved.mesh.devices.flat[1]]
    again = jaxmoe.move(moved, mesh=mesh_of(1, 1, 1), lost_devices=lost)
    check_rows(again, ["again", "attention", None, "all experts"], merged)


def test_packed_weights_stay_packed(adapters, tmp_path) -> None:
    jaxmoe.convert(QWEN, tmp_path / "packed", quantize="int8")
    mesh = mesh_of(1, 2, 2)
    model = jaxmoe.load(tmp_path / "packed", mesh=mesh, adapters={"some": adapters["some"]})
    assert model.moe_layers[0].w_gate_up.get_value().dtype == np.int8
    expected = jaxmoe.load(tmp_path / "packed", mesh=mesh_of(1, 1, 1), adapter=adapters["some"])
    expected = np.asarray(expected(TOKENS))
    logits = np.asarray(model(TOKENS, adapters=["some"] * 4))
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


FORMS = sorted(
    path.relative_to(GOLDENS)
    for form in ("original", "fused")
    for path in GOLDENS.glob(f"*/{form}")
    if not (path / "adapter_config.json").exists()
)


def adapter_of_all(model, directory) -> Arrays:
    """Factors of every matrix that may have adapters, under the names of the files; of fused experts as PEFT has them."""
    specs = {spec.path: spec for spec in param_specs(model)}
    mapped = FamilyCheckpoint.open(directory).onto(specs)
    adaptable, arrays = adaptable_params(model), {}
    others = {name for name, block in mapped.used_blocks() if block.param not in adaptable}
    for name in sorted({name for name, _ in mapped.used_blocks()} - others):
        shape = mapped.checkpoint.tensors[name].shape
        if len(shape) == 2 and name.endswith(".weight"):
            arrays |= factors(name.removesuffix(".weight"), *shape)
        elif len(shape) == 3 and name.endswith(".experts.gate_up_proj"):
            module = name.removesuffix(".gate_up_proj")
            down = mapped.checkpoint.tensors[f"{module}.down_proj"].shape
            arrays |= factors(f"{module}.base_layer", *shape[1:], R * shape[0]) | factors(
                module, *down[1:], R * down[0]
            )
    return arrays


@pytest.mark.covering(most=6)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_factors_make_the_update_that_is_merged(form, tmp_path) -> None:
    """Of every matrix of every family: B·A of its factors is what merging adds, on every device."""
    directory = GOLDENS / form
    mesh = mesh_of(1, 2, 2)
    base = jaxmoe.load(directory, mesh=mesh, placement="round_robin")
    adapter = write_adapter(tmp_path / "adapter", adapter_of_all(base, directory), target_parameters=FUSED)
    merged = jaxmoe.load(directory, mesh=mesh, placement="round_robin", adapter=adapter)
    jaxmoe.add_adapter(base, "all", adapter, room=2)
    before, after = params(base), params(merged)
    held = {path: np.asarray(factor[...]) for path, factor in held_factors(base).items()}
    checked = set()
    for path in before:
        update = after[path] - before[path]
        if f"{path}_lora_a" not in held:
            np.testing.assert_array_equal(update, 0, err_msg=path)
            continue
        a, b = held[f"{path}_lora_a"], held[f"{path}_lora_b"]
        product = "pr...,prk->p...k" if before[path].ndim > 2 else "nr,rk->nk"
        a, b = (a[:, 0], np.moveaxis(b[:, 0], -1, 1)) if before[path].ndim > 2 else (a[0], b[:, 0])
        np.testing.assert_allclose(np.einsum(product, b, a), update, atol=2e-5, err_msg=path)
        checked.add(path)
    assert checked


REFUSED = {
    "modules_to_save": (
        {**attention_adapter(), "base_model.model.lm_head.weight": np.zeros((97, D), np.float32)},
        {"r": 3, "modules_to_save": ["lm_head"]},
        r"low-rank factors only; this one has whole tensors, such as 'lm_head.weight'.*merge it",
    ),
    "router": (factors("model.layers.0.mlp.gate", E, D), {}, r"changes 'model.layers.0.mlp.gate.weight'.*merge it"),
    "head": (factors("lm_head", 97, D), {}, r"of matrices of attention, MLPs and experts; this one changes 'lm_head"),
    "rank": (factors("model.layers.0.self_attn.q_proj", 64, D, 65), {"r": 65}, r"ranks up to 64; this one has 65"),
    "another model": (factors("model.layers.0.self_attn.q_proj", 60, D), {}, r"B·A must have the shape"),
    "DoRA": (attention_adapter(), {"r": 3, "use_dora": True}, r"DoRA scales"),
}


@pytest.fixture(scope="module")
def base():
    return jaxmoe.load(QWEN, mesh=mesh_of(1, 1, 1))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_stay_apart_is_refused(kind, base, tmp_path) -> None:
    tensors, config, message = REFUSED[kind]
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        jaxmoe.add_adapter(base, "one", adapter)
    assert base.adapters == ()
    assert not held_factors(base)


def test_names_and_numbers_are_checked(adapters) -> None:
    model = jaxmoe.load(QWEN, mesh=mesh_of(1, 1, 1), adapters={"some": adapters["some"]})
    with pytest.raises(ValueError, match=r"got 'other', and the model holds 'some'"):
        jaxmoe.generate(model, [[5]], max_new_tokens=1, adapters=["other"])
    with pytest.raises(ValueError, match=r"for each of the 1 sequences; got 2 of them"):
        jaxmoe.generate(model, [[5]], max_new_tokens=1, adapters=["some", None])
    with pytest.raises(ValueError, match=r"for each of the 1 sequences; got 'some'"):
        model([[5]], adapters="some")
    with pytest.raises(ValueError, match=r"'some' is taken"):
        jaxmoe.add_adapter(model, "some", adapters["attention"])
    with pytest.raises(ValueError, match=r"at least one character; got ''"):
        jaxmoe.add_adapter(model, "", adapters["attention"])
    with pytest.raises(ValueError, match=r"rank"):
        jaxmoe.add_adapter(model, "attention", adapters["attention"], rank=65)
    with pytest.raises(ValueError, match=r"got 'attention', and the model holds 'some'"):
        jaxmoe.remove_adapter(model, "attention")


def test_the_command_tells_the_adapter_of_each_prompt(adapters, capsys) -> None:
    argv = ["generate", str(QWEN), "--mesh", "dp=8", "--prompt-ids", "5,6,7", "--prompt-ids", "5,6,7"]
    argv += ["--max-new-tokens", "1", "--ignore-eos", "--json", "--no-progress"]
    named = ["--adapter", f"a={adapters['attention']}", "--adapter", f"b={adapters['some']}"]
    assert main([*argv, *named, "--use-adapter", "a", "--use-adapter", "none"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["adapter"] for record in records] == ["a", None]
    assert records[0]["token_ids"] != records[1]["token_ids"]
    for wrong, message in (
        ([*named, "--use-adapter", "c"], "c is none of a, b"),
        ([*named, *["--use-adapter", "a"] * 3], "for each of the 2 prompts; got 3"),
        (named, "say --use-adapter a, none for the model without it, or --adapter DIR"),
        (["--adapter", "x", "--adapter", "y"], "one DIR to merge"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*argv, *wrong])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("case", ROUNDING[::2], ids=[f"{family}-{form}" for family, *_, form in ROUNDING[::2]])
def test_inputs_of_packed_weights_are_rounded_beside_adapters_too(case, tmp_path) -> None:
    """Rows without an adapter are rounded in a mixed batch as they are in one without adapters."""
    family, weights, block, _ = case
    quantized, _ = write_rounding(tmp_path, family, weights, block)
    load = {"mesh": mesh_of(1, 2, 2), "dtype": "float32"}
    model = jaxmoe.load(quantized, **load, activations="checkpoint")
    down = "block_sparse_moe.experts.{}.w2" if family == "mixtral" else "mlp.experts.{}.down_proj"
    parts = {down.format(expert): model.moe_layers[-1].w_down.shape[1:] for expert in range(3)}
    parts["self_attn.o_proj"] = model.layers[1].attention.w_o.shape
    tensors = {
        name: value for part, size in parts.items() for name, value in factors(f"model.layers.1.{part}", *size).items()
    }
    expected = np.asarray(model(TOKENS))
    jaxmoe.add_adapter(model, "one", write_adapter(tmp_path / "adapter", tensors))
    logits = np.asarray(model(TOKENS, adapters=["one", None, None, "one"]))
    error = np.abs(logits - expected).max(-1) / np.abs(expected).max()
    # A number that lies between two of its form may go either way, and takes its sequence along.
    assert np.median(error[1:3]) < 2e-5
    assert np.max(error[[0, 3]]) > 1e-3
