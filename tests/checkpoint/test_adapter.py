"""`jaxmoe.load(adapter=...)`: against whole weights merged with NumPy, and against PEFT where it is installed."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxmoe
from jaxmoe.checkpoint import CheckpointError, load_arrays, make_load_plan, open_checkpoint, whole_tensor_blocks
from jaxmoe.checkpoint.loading.merge import merge_adapter
from jaxmoe.checkpoint.loading.targets import HostTarget
from jaxmoe.checkpoint.lora.adapter import open_adapter
from jaxmoe.checkpoint.lora.update import LowRankUpdate, TensorDelta, delta_weight
from jaxmoe.checkpoint.mapping.ignore import IgnoreRule
from jaxmoe.checkpoint.nearest import nearest_name
from jaxmoe.cli import main
from tests.support.adapters import Arrays, R, check_equal, factors, params, write_adapter
from tests.support.goldens import GOLDENS
from tests.support.loading import PATHS, Case, add_experts, spec
from tests.support.meshes import mesh_of
from tests.support.writing import write_checkpoint

pytestmark = pytest.mark.covering

E, D, F = 11, 32, 24
FAMILIES = ("qwen3_moe", "mixtral")
FORMS = ("original", "fused")
MESHES = ((1, 1, 1), (2, 2, 2), (1, 2, 4))
ATTENTION = {
    "qwen3_moe": {"q_proj": (64, D), "v_proj": (16, D), "o_proj": (D, 64)},
    "mixtral": {"q_proj": (32, D), "v_proj": (8, D), "o_proj": (D, 32)},
}


def read_golden(family: str, form: str) -> Arrays:
    return {
        k: v for file in sorted((GOLDENS / family / form).glob("*.safetensors")) for k, v in load_file(file).items()
    }


def attention_adapter(family: str) -> Arrays:
    """Factors of three projections of every layer."""
    return {
        name: value
        for layer in range(2)
        for part, (out, inputs) in ATTENTION[family].items()
        for name, value in factors(f"model.layers.{layer}.self_attn.{part}", out, inputs).items()
    }


def fused_adapter() -> Arrays:
    """Factors of both parameters of all experts of layer 1, under the names that transformers has."""
    module = "model.layers.1.mlp.experts"
    return factors(f"{module}.base_layer", 2 * F, D, R * E) | factors(module, D, F, R * E)


def per_expert_adapter(family: str) -> Arrays:
    """Factors of single projections of some experts of layer 0, of each kind, under the names of the original files."""
    block, names = {
        "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
        "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    }[family]
    sizes = ((F, D), (F, D), (D, F))
    module = f"model.layers.0.{block}.experts"
    chosen = ((0, 0), (3, 1), (9, 2), (10, 0), (10, 1), (10, 2))
    return {
        name: value
        for expert, part in chosen
        for name, value in factors(f"{module}.{expert}.{names[part]}", *sizes[part]).items()
    }


FUSED_TARGETS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def merged_by_numpy(family: str, form: str, adapter: Arrays, scale: float = 1.5) -> Arrays:
    """The golden's tensors with the adapters above merged into whole weights, written without the library."""
    tensors = read_golden(family, form)
    block, names = ("mlp", ("gate_proj", "up_proj", "down_proj"))
    if family == "mixtral" and form == "original":
        block, names = "block_sparse_moe", ("w1", "w3", "w2")

    def add(layer: int, expert: int, part: int, delta: np.ndarray) -> None:
        experts = f"model.layers.{layer}.{block}.experts"
        if form == "original":
            tensors[f"{experts}.{expert}.{names[part]}.weight"] += delta
        elif part == 2:
            tensors[f"{experts}.down_proj"][expert] += delta
        else:
            tensors[f"{experts}.gate_up_proj"][expert, part * F : (part + 1) * F] += delta

    for name, a in adapter.items():
        if ".lora_A." not in name:
            continue
        b = adapter[name.replace(".lora_A.", ".lora_B.")]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer, *_, last = module.removeprefix("model.layers.").split(".")
        if "self_attn" in module:
            tensors[f"{module}.weight"] += scale * b @ a
        elif last in ("base_layer", "experts"):
            # The rows of A are expert-major, the columns of B rank-major.
            deltas = scale * np.einsum("ore,eri->eoi", b.reshape(len(b), -1, E), a.reshape(E, -1, a.shape[-1]))
            for expert, delta in enumerate(deltas):
                for part, rows in ((0, delta[:F]), (1, delta[F:])) if last == "base_layer" else ((2, delta),):
                    add(int(layer), expert, part, rows)
        else:
            part = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}[last]
            add(int(layer), int(module.split(".")[-2]), part, scale * b @ a)
    return tensors


def checkpoint_of(tensors: Arrays, family: str, directory: Path) -> Path:
    write_checkpoint(directory, tensors)
    shutil.copy(GOLDENS / family / "original" / "config.json", directory)
    return directory


# Against whole weights.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_equals_merged_whole_weights(family, form, tmp_path) -> None:
    """Attention, experts one by one and fused parameters in one adapter, whichever form the checkpoint has."""
    tensors = attention_adapter(family) | per_expert_adapter(family) | fused_adapter()
    adapter = write_adapter(tmp_path / "adapter", tensors, **FUSED_TARGETS)
    merged = checkpoint_of(merged_by_numpy(family, form, tensors), family, tmp_path / "merged")
    base = GOLDENS / family / form
    for shape in MESHES:
        mesh = mesh_of(*shape)
        model = jaxmoe.load(base, mesh=mesh, adapter=adapter, placement="round_robin", check_finite=True)
        check_equal(params(model), params(jaxmoe.load(merged, mesh=mesh, placement="round_robin")))
        report = model.load_report
        assert report.bytes_read == report.bytes_needed == sum(v.nbytes for v in read_golden(family, form).values())
        assert report.adapter.bytes_read == sum(value.nbytes for value in tensors.values())
        assert report.adapter.factors == len(tensors)


def test_report_tells_what_was_merged(tmp_path) -> None:
    tensors = attention_adapter("qwen3_moe") | per_expert_adapter("qwen3_moe")
    adapter = write_adapter(tmp_path / "adapter", tensors)
    report = jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 1, 1), adapter=adapter).load_report
    assert json.loads(json.dumps(report.to_dict()))["adapter"] == {
        "path": str(adapter),
        "factors": len(tensors),
        "bytes_read": sum(value.nbytes for value in tensors.values()),
        "merged": {
            "model.layers.*.mlp.experts.*.down_proj.weight": 2,
            "model.layers.*.mlp.experts.*.gate_proj.weight": 2,
            "model.layers.*.mlp.experts.*.up_proj.weight": 2,
            "model.layers.*.self_attn.o_proj.weight": 2,
            "model.layers.*.self_attn.q_proj.weight": 2,
            "model.layers.*.self_attn.v_proj.weight": 2,
        },
        "replaced": [],
    }
    plain = jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 1, 1)).load_report
    assert plain.adapter is None
    assert report.bytes_read == plain.bytes_read


def test_the_update_is_added_before_the_cast(tmp_path) -> None:
    """Weights of 1 and an update of 2⁻⁹, which bfloat16 holds in neither sum: three updates make a step, one does not."""
    value = np.ones((4, 8), np.float32)
    a, b = np.full((3, 8), 2.0**-9, np.float32), np.ones((4, 3), np.float32)
    b[:2, 1:] = 0
    directory = write_checkpoint(tmp_path / "base", {"w.weight": value})
    adapter = write_adapter(tmp_path / "adapter", {"w.lora_A.weight": a, "w.lora_B.weight": b}, r=3)
    bf16 = np.dtype(ml_dtypes.bfloat16)
    arrays, _ = load_merged(directory, {"w.weight": spec(mesh_of(1, 1, 1), "w.weight", (4, 8), dtype=bf16)}, adapter)
    np.testing.assert_array_equal(np.asarray(arrays["w.weight"])[:, 0].astype(np.float32), [1, 1, 1 + 2**-7, 1 + 2**-7])


def load_merged(directory: Path, specs: dict, adapter: Path, *, ignore=(), **options):
    checkpoint = open_checkpoint(directory)
    blocks = [block for name, one in specs.items() for block in whole_tensor_blocks(one, name)]
    plan = make_load_plan(checkpoint, specs.values(), blocks, ignore=ignore)
    return load_arrays(merge_adapter(plan, checkpoint, open_adapter(adapter)), **options)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("path", PATHS)
def test_large_tensors_are_merged_piece_by_piece(path, tmp_path) -> None:
    mesh, rng = mesh_of(2, 2, 2), np.random.default_rng(0)
    bf16 = np.dtype(ml_dtypes.bfloat16)
    shapes = {"rows.weight": (61, 128), "columns.weight": (61, 128), "wide.weight": (3, 9000), "other": (64, 100)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["rows.weight"] = tensors["rows.weight"].astype(bf16)
    dims = {"columns.weight": (None, ("tp", "ep")), "wide.weight": (None, "dp"), "other": ("ep", None)}
    specs = {name: spec(mesh, name, shape, dims.get(name, ())) for name, shape in shapes.items()}
    modules = [name.removesuffix(".weight") for name in tensors if name != "other"]
    parts = {name: value for module in modules for name, value in factors(module, *shapes[f"{module}.weight"]).items()}
    adapter = write_adapter(tmp_path / "adapter", parts)
    directory = write_checkpoint(tmp_path / "base", tensors)
    arrays, report = load_merged(directory, specs, adapter, **PATHS[path])
    assert report.bytes_read == report.bytes_needed
    for name, value in tensors.items():
        expected = value.astype(np.float32)
        if name != "other":
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            expected += 1.5 * parts[f"{prefix}.lora_B.weight"] @ parts[f"{prefix}.lora_A.weight"]
        np.testing.assert_allclose(arrays[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(arrays["other"], tensors["other"])


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_tensors_that_are_stored_in_another_order(order) -> None:
    """Boxes are those of the file, and so is the result."""
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal((2, 5)), "b": rng.standard_normal((4, 2))}
    update = LowRankUpdate(
        target="w",
        box=((1, 2), (0, 4), (0, 5)),
        expert=1,
        a="a",
        b="b",
        rank_a=slice(0, 2),
        rank_b=slice(0, 2),
        scale=2,
    )
    logical = ((0, 3), (1, 4), (2, 5))
    expected = delta_weight([update], logical, arrays).transpose(order)
    delta = TensorDelta((update,), arrays, order)
    np.testing.assert_array_equal(delta.of(tuple(logical[dim] for dim in order)), expected)
    untouched = ((0, 1), (1, 4), (2, 5))
    assert delta.of(tuple(untouched[dim] for dim in order)) is None


def test_base_weights_in_a_torch_file_that_are_stored_transposed(tmp_path) -> None:
    base = Path(__file__).resolve().parent / "data" / "torch_permuted.bin"
    mesh = mesh_of(2, 2, 2)
    specs = {
        "transposed": spec(mesh, "transposed", (6, 4), ("ep", "tp")),
        "permuted": spec(mesh, "permuted", (4, 2, 3)),
    }
    checkpoint = open_checkpoint(base)
    blocks = [block for name, one in specs.items() for block in whole_tensor_blocks(one, name)]
    plan = make_load_plan(checkpoint, specs.values(), blocks)
    plain, _ = load_arrays(plan)
    matrix, experts = factors("layer", 6, 4), factors("experts", 2, 3, R * 4)
    adapter = write_adapter(tmp_path / "adapter", matrix | experts, target_parameters=["experts.permuted"])
    names = {"layer.weight": "transposed", "experts.permuted": "permuted"}
    opened = open_adapter(adapter)
    arrays, _ = load_arrays(merge_adapter(plan, checkpoint, opened, rename=lambda name: names.get(name, name)))
    a, b = matrix.values()
    np.testing.assert_allclose(arrays["transposed"], plain["transposed"] + 1.5 * b @ a, rtol=1e-5, atol=1e-5)
    a, b = experts.values()
    delta = 1.5 * np.einsum("ore,eri->eoi", b.reshape(2, R, 4), a.reshape(4, R, 3))
    np.testing.assert_allclose(arrays["permuted"], plain["permuted"] + delta, rtol=1e-5, atol=1e-5)


def test_what_is_not_adapted_is_read_straight_to_its_place(tmp_path, monkeypatch) -> None:
    """Of all the tensors on one device, only pieces that an update touches are written by way of other memory."""
    written = []
    write = HostTarget.write

    def noting(self, box, *more):
        written.append((self._shard.spec.path, box))
        write(self, box, *more)

    monkeypatch.setattr(HostTarget, "write", noting)
    base, mesh = GOLDENS / "qwen3_moe" / "fused", mesh_of(1, 1, 1)
    jaxmoe.load(base, mesh=mesh)
    assert not written
    adapter = write_adapter(tmp_path / "adapter", per_expert_adapter("qwen3_moe"))
    jaxmoe.load(base, mesh=mesh, adapter=adapter)
    assert {path for path, _ in written} == {"layers.0.moe.w_gate_up", "layers.0.moe.w_down"}
    assert {box[0][0] for path, box in written if path.endswith("w_down")} == {9, 10}


def test_a_process_reads_factors_of_its_own_experts_only(tmp_path) -> None:
    mesh, case = mesh_of(1, 1, 8), Case()
    add_experts(case, mesh, np.random.default_rng(0), range(8), 8, "per_expert", model=D, width=F)
    directory = write_checkpoint(tmp_path / "base", case.tensors)
    parts = {name: factors(name.removesuffix(".weight"), *value.shape) for name, value in case.tensors.items()}
    adapter = write_adapter(tmp_path / "adapter", {k: v for own in parts.values() for k, v in own.items()})
    checkpoint, local = open_checkpoint(directory), {mesh.devices.flat[5]}
    plan = make_load_plan(checkpoint, case.specs, case.blocks, local_devices=local)
    plan = merge_adapter(plan, checkpoint, open_adapter(adapter))
    needed = {read.tensor.name for read in plan.reads}
    assert len(needed) == 3
    assert plan.deltas.keys() == needed
    assert plan.adapter.bytes_read == sum(value.nbytes for name in needed for value in parts[name].values())
    assert sum(plan.adapter.merged.values()) == len(case.tensors)


def test_an_adapter_without_factors_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="an adapter has factors; this file has no tensors"):
        open_adapter(write_adapter(tmp_path / "adapter", {}))


def test_nearest_name() -> None:
    names = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(4) for part in "qk"]
    assert nearest_name("model.layers.7.self_attn.q_proj.weight", names) == "model.layers.3.self_attn.q_proj.weight"
    assert nearest_name("layers.2.attn.k_proj.weight", names) == "model.layers.2.self_attn.k_proj.weight"
    assert nearest_name("something", names) is None


# Refusals.


def test_adapters_that_are_not_there(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such directory; name one with adapter_config.json"):
        open_adapter(tmp_path / "nowhere")
    (tmp_path / "README.md").touch()
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_config.json, there is README.md; name the dir"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 3}')
    with pytest.raises(
        FileNotFoundError, match=r"there is no adapter_model.safetensors or adapter_model.bin, there is"
    ):
        open_adapter(tmp_path)


def refuse(tmp_path: Path, tensors: Arrays, match: str, **config) -> str:
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(CheckpointError, match=match) as error:
        jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 1, 1), adapter=adapter)
    assert str(adapter) in str(error.value)
    return str(error.value)


def test_an_adapter_of_another_kind(tmp_path) -> None:
    refuse(tmp_path / "dora", attention_adapter("qwen3_moe"), "use_dora: DoRA scales each output", use_dora=True)
    refuse(tmp_path / "loha", attention_adapter("qwen3_moe"), "of peft_type LORA", peft_type="LOHA")
    quantized = {name: np.ones((2, 2), np.uint8) for name in attention_adapter("qwen3_moe")}
    refuse(tmp_path / "uint8", quantized, "are BF16, F16, F32 or F64; .* is U8")


def test_an_adapter_for_another_model(tmp_path) -> None:
    refuse(
        tmp_path / "shape", factors("model.layers.0.self_attn.q_proj", 32, D), r"has \(32, 32\), and .* has \(64, 32\)"
    )
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(6)]
    deeper = {name: value for module in modules for name, value in factors(module, 64, D).items()}
    match = (
        r"has 4 problems: .*layers.2.self_attn.q_proj.weight' is not; the nearest is 'model.layers.1.self_attn.q_proj"
    )
    refuse(tmp_path / "deeper", deeper, match)
    other = factors("transformer.h.0.attn.c_attn", 64, D)
    refuse(tmp_path / "other", other, "'transformer.h.0.attn.c_attn.weight' is not; is the adapter for this model")
    experts = factors("model.layers.0.mlp.experts.11.up_proj", F, D)
    refuse(
        tmp_path / "experts", experts, r"experts.11.up_proj.weight' is not; the nearest is .*experts.10.up_proj.weight"
    )


def test_tensors_that_cannot_be_adapted(tmp_path) -> None:
    tensors = {"w.weight": np.zeros((4, 8), np.uint8), "mtp.weight": np.zeros((4, 8), np.float32)}
    directory = write_checkpoint(tmp_path / "base", tensors)
    specs = {"w.weight": spec(mesh_of(1, 1, 1), "w.weight", (4, 8), dtype=np.dtype(np.uint8))}
    adapter = write_adapter(tmp_path / "adapter", factors("w", 4, 8) | factors("mtp", 4, 8))
    match = "'w.weight' is U8; .* 'mtp.weight' is not, by the rule 'prediction layers'"
    with pytest.raises(CheckpointError, match=match):
        load_merged(directory, specs, adapter, ignore=[IgnoreRule(name="prediction layers", pattern=r"mtp\..*")])


def test_values_that_are_not_finite(tmp_path) -> None:
    tensors = attention_adapter("qwen3_moe")
    next(iter(tensors.values()))[0, 0] = np.inf
    adapter = write_adapter(tmp_path / "adapter", tensors)
    base, mesh = GOLDENS / "qwen3_moe" / "original", mesh_of(1, 1, 1)
    with pytest.raises(CheckpointError, match="'model.layers.0.self_attn.q_proj.weight' has some once the adapter is"):
        jaxmoe.load(base, mesh=mesh, adapter=adapter, check_finite=True)


# The command.


@pytest.mark.full
def test_the_command_takes_an_adapter(tmp_path, capsys) -> None:
    def generated(checkpoint: Path, *more: str) -> list[int]:
        argv = ["generate", str(checkpoint), "--prompt-ids", "5,6,7", "--max-new-tokens", "8", "--ignore-eos", "--json"]
        assert main([*argv, "--mesh", "dp=2,tp=2,ep=2", *more]) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    tensors = attention_adapter("mixtral") | fused_adapter()
    adapter = write_adapter(tmp_path / "adapter", tensors, **FUSED_TARGETS)
    merged = checkpoint_of(merged_by_numpy("mixtral", "original", tensors), "mixtral", tmp_path / "merged")
    base = GOLDENS / "mixtral" / "original"
    adapted = generated(base, "--adapter", str(adapter))
    assert adapted == generated(merged)
    assert adapted != generated(base)
    assert main(["generate", str(base), "--prompt-ids", "5", "--adapter", str(tmp_path)]) == 1
    assert "there is no adapter_config.json, there is adapter, merged" in capsys.readouterr().err


# Against PEFT.

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param("qwen3_moe", {"target_modules": ["q_proj", "o_proj"], "target_parameters": BOTH}, id="qwen3_moe"),
        pytest.param(
            "mixtral", {"target_modules": ["v_proj"], "target_parameters": BOTH, "use_rslora": True}, id="rslora"
        ),
        pytest.param(
            "mixtral",
            {
                "target_modules": ["q_proj", "k_proj", "lm_head"],
                "target_parameters": [*BOTH, "mlp.gate.weight"],
                "rank_pattern": {"experts.gate_up_proj": 3, "q_proj": 5, "mlp.gate.weight": 4},
                "alpha_pattern": {"layers.1.mlp.experts.down_proj": 9, "k_proj": 1},
            },
            id="patterns",
        ),
        # What transformers 4 called these modules: PEFT makes target_parameters of them.
        pytest.param("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}, id="old names"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_merging_equals_pefts(family, config, tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="live parity needs torch, transformers and peft")
    from scripts.make_goldens import make_model, save_forms

    model = make_model(family, seed=7)
    save_forms(model, tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **config))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    save_forms(adapted.merge_and_unload(), tmp_path / "merged")
    expected = params(jaxmoe.load(tmp_path / "merged" / "original", mesh=mesh_of(1, 2, 4)))
    for form in FORMS:
        loaded = jaxmoe.load(tmp_path / "base" / form, mesh=mesh_of(1, 2, 4), adapter=tmp_path / "adapter")
        check_equal(params(loaded), expected)
    with pytest.raises(AssertionError):
        check_equal(params(jaxmoe.load(tmp_path / "base" / "fused", mesh=mesh_of(1, 2, 4))), expected)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_factors_in_a_torch_file(tmp_path) -> None:
    peft = pytest.importorskip("peft", reason="live parity needs torch, transformers and peft")
    from scripts.make_goldens import make_model

    config = peft.LoraConfig(
        r=2, lora_alpha=3, init_lora_weights=False, target_modules=["q_proj"], target_parameters=BOTH
    )
    adapted = peft.get_peft_model(make_model("qwen3_moe", seed=0), config)
    adapted.save_pretrained(tmp_path / "safe")
    adapted.save_pretrained(tmp_path / "torch", safe_serialization=False)
    assert (tmp_path / "torch" / "adapter_model.bin").is_file()
    base, mesh = GOLDENS / "qwen3_moe" / "fused", mesh_of(2, 2, 2)
    ours, expected = (params(jaxmoe.load(base, mesh=mesh, adapter=tmp_path / kind)) for kind in ("torch", "safe"))
    check_equal(ours, expected, rtol=0, atol=0)


def whole(name: str, shape: tuple[int, ...], wrapped: str = "") -> Arrays:
    module, _, kind = name.rpartition(".")
    value = np.random.default_rng([len(name), *shape]).standard_normal(shape).astype(np.float32)
    return {f"base_model.model.{module}{wrapped}.{kind}": value}


EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WHOLE: dict[str, tuple[Arrays, dict[str, Any]]] = {
    "modules to save": (
        whole(EMBED, (97, 32)) | whole(HEAD, (97, 32)),
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "a grown vocabulary": (whole(EMBED, (101, 32)) | whole(HEAD, (101, 32)), {}),
    "the embedding alone": (whole(EMBED, (97, 32)), {"modules_to_save": ["embed_tokens"]}),
    "a head around its own factors": (
        whole(EMBED, (97, 32)) | whole(HEAD, (97, 32), ".base_layer") | factors("lm_head", 97, 32),
        {},
    ),
    "a norm": (whole(NORM, (32,), ".modules_to_save.default"), {}),
    "a router": (whole("model.layers.1.mlp.gate.weight", (11, 32)), {"modules_to_save": ["gate"]}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", WHOLE)
def test_whole_modules_take_the_place_of_the_checkpoints(case, tied, tmp_path) -> None:
    adapter, config = WHOLE[case]
    base = read_golden("qwen3_moe", "original")
    if tied:
        del base[HEAD]
    directory = checkpoint_of(base, "qwen3_moe", tmp_path / "base")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": tied}))
    lora = factors("model.layers.0.self_attn.q_proj", 64, 32)
    model = jaxmoe.load(
        directory, mesh=mesh_of(1, 2, 2), adapter=write_adapter(tmp_path / "adapter", adapter | lora, **config)
    )

    expected = {HEAD: base[EMBED], **base} if tied else dict(base)
    replaced = []
    for name, value in adapter.items():
        plain = (
            name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")
        )
        if "lora" not in plain:
            expected[plain] = value
            replaced.append(plain)
    for module in ["model.layers.0.self_attn.q_proj", *(["lm_head"] if "factors" in case else [])]:
        a, b = factors(module, *expected[f"{module}.weight"].shape).values()
        expected[f"{module}.weight"] = expected[f"{module}.weight"] + 1.5 * b @ a
    merged = checkpoint_of(expected, "qwen3_moe", tmp_path / "merged")
    (merged / "config.json").write_text(json.dumps(settings | {"vocab_size": len(expected[EMBED])}))
    wanted = params(jaxmoe.load(merged, mesh=mesh_of(1, 2, 2)))
    if tied and not {EMBED, HEAD} & set(replaced):
        del wanted["lm_head.weight"]  # still one tensor
    check_equal(params(model), wanted)
    assert set(replaced) <= set(model.load_report.adapter.replaced)
    assert model.load_report.bytes_read == model.load_report.bytes_needed
    jaxmoe.save(model, tmp_path / "saved")
    check_equal(params(jaxmoe.load(tmp_path / "saved", mesh=mesh_of(1, 2, 2))), wanted)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (whole("score.weight", (2, 32)), r"replaces a tensor of the checkpoint, and that has no 'score.weight'"),
        (
            whole(NORM, (33,)),
            r"has shape \(33,\), and 'model.norm.weight', which it replaces, \(32,\): only vocabularies",
        ),
        (
            whole(EMBED, (101, 32)),
            r"'model.embed_tokens.weight' \(101, 32\) and 'lm_head.weight' \(97, 32\); save both",
        ),
    ],
)
def test_whole_modules_that_do_not_fit(tensors, message, tmp_path) -> None:
    refuse(tmp_path, tensors | factors("model.layers.0.self_attn.q_proj", 64, 32), message)
