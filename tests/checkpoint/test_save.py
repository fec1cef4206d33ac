"""load, save, load again: the same bits, from any mesh and placement, in either form."""

import json
import re
import shutil
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmoe
from jaxmoe.checkpoint import CheckpointError, open_checkpoint
from jaxmoe.checkpoint.mapping import written_form
from jaxmoe.checkpoint.saving import values
from jaxmoe.checkpoint.saving.directory import copy_side_files
from jaxmoe.checkpoint.saving.outputs import OutputTensor
from jaxmoe.checkpoint.saving.values import ModelValues
from jaxmoe.checkpoint.saving.write import divide_into_files, parse_size, write_files
from jaxmoe.layers import params_by_path
from jaxmoe.models import Decoder, get_family
from jaxmoe.placement import ExpertPlacement
from tests.support.families import FAMILIES
from tests.support.goldens import GOLDENS
from tests.support.meshes import MESH_SHAPES, mesh_of
from tests.support.runs import examples
from tests.support.saved import (
    SOURCES,
    assert_equal_tensors,
    assert_same_parameters,
    assert_same_tensors,
    name_in_transformers,
    read_all,
)
from tests.support.writing import write_checkpoint

pytestmark = pytest.mark.covering

FORMS = ("per_expert", "fused")


def assert_a_form_of_transformers(ours: Path, family: str) -> None:
    """The same tensors, bit for bit, as in one of the forms in which transformers saves the model."""
    names = open_checkpoint(ours).tensors.keys()
    if family == "deepseek_v4" and "embed.weight" in names:
        found, theirs = read_all(ours), GOLDENS / family / "original"
        assert_equal_tensors({name_in_transformers(name): found[name] for name in names}, read_all(theirs))
        return
    if family == "kimi_linear" and not any(".conv1d." in name for name in names):
        # Dense MLPs have the publisher's name, which transformers reads, and not that of the MoE block, which it writes.
        found, theirs = read_all(ours), GOLDENS / family / "original"
        dense = {name: re.sub(r"\.mlp\.(?=(gate|up|down)_proj)", ".block_sparse_moe.", name) for name in names}
        assert_equal_tensors({dense[name]: found[name] for name in names}, read_all(theirs))
        return
    if family == "longcat_flash":
        # transformers makes gate and up for zero experts and never reads them; files of the publisher have none.
        found, theirs = read_all(ours), read_all(GOLDENS / family / "original")
        unread = {name for name in theirs if re.search(r"\.experts\.1[1-5]\.", name)}
        assert unread
        assert_equal_tensors(
            {n: v for n, v in found.items() if n not in unread}, {n: theirs[n] for n in theirs.keys() - unread}
        )
        return
    theirs = [path for path in SOURCES if path.parent.name == family and open_checkpoint(path).tensors.keys() == names]
    assert theirs, f"transformers writes no such names: {sorted(names)}"
    assert_same_tensors(ours, theirs[0])


@st.composite
def placements(draw, experts: int, ep: int):
    """Every expert somewhere, then replicas and padding, in any order."""
    extra = draw(st.lists(st.integers(0, experts - 1), max_size=ep))
    padding = -(experts + len(extra)) % ep
    slots = draw(st.permutations([*range(experts), *extra, *[-1] * padding]))
    return ExpertPlacement(num_experts=experts, ep=ep, slot_to_expert=np.array(slots))


@settings(max_examples=examples(4, 12))
@given(data=st.data())
def test_round_trip(data, tmp_path_factory):
    source, form = data.draw(st.sampled_from(SOURCES), "source"), data.draw(st.sampled_from(FORMS), "form")
    family = source.parent.name
    mesh = mesh_of(*data.draw(st.sampled_from([(1, 1, 1), *MESH_SHAPES]), "mesh"))
    config = get_family(family).read_config(json.loads((source / "config.json").read_text()))
    experts = [config.layers[i].feed_forward.num_experts for i in config.moe_layers]
    placed = [data.draw(placements(count, mesh.shape["ep"]), "placement") for count in experts]
    dtype = data.draw(st.sampled_from([None, "bfloat16"]), "dtype")
    model = jaxmoe.load(source, mesh=mesh, placement=placed, dtype=dtype)
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    size = data.draw(st.sampled_from(["5GB", "100KB", 1]), "size")
    report = jaxmoe.save(model, directory, form=form, max_shard_size=size)
    assert report.tensors == len(open_checkpoint(directory).tensors)
    assert (len(report.files) > 1) == (directory / "model.safetensors.index.json").exists() == (size != "5GB")
    assert_same_parameters(jaxmoe.load(directory, mesh=mesh, placement=placed), model)
    if dtype is None:
        assert_a_form_of_transformers(directory, family)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_converting_gives_what_transformers_writes(source, form, tmp_path):
    calls = []
    report = jaxmoe.convert(
        source, tmp_path / "out", form=form, max_shard_size="70KB", progress=lambda *call: calls.append(call)
    )
    assert_a_form_of_transformers(tmp_path / "out", source.parent.name)
    assert report.form == written_form(get_family(source.parent.name), form)
    config = (tmp_path / "out" / "config.json").read_bytes()
    assert config == (source / "config.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert calls[-1] == (report.bytes_written, report.bytes_written)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes_written
    counts = [size // (8 if dtype == "I64" else 4) for dtype, size in report.dtypes.items()]
    assert index["metadata"]["total_parameters"] == sum(counts)
    assert json.loads(json.dumps(report.to_dict()))["bytes_written"] == sum(report.files.values())


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_it_with_equal_logits(family, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = GOLDENS / family / "original"
    model = jaxmoe.load(source, mesh=mesh_of(2, 2, 2), placement="round_robin")
    for form in FORMS:
        jaxmoe.save(model, tmp_path / form, form=form, max_shard_size="60KB")
    tokens = torch.tensor([[1, 5, 9, 33, 2, 7]])
    parameters, logits = [], []
    for directory in (source, *(tmp_path / form for form in FORMS)):
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        parameters.append(loaded.state_dict())
        with torch.no_grad():
            logits.append(loaded(tokens).logits.numpy())
    for form, ours, computed in zip(FORMS, parameters[1:], logits[1:], strict=True):
        assert ours.keys() == parameters[0].keys(), form
        for name, value in parameters[0].items():
            assert torch.equal(ours[name], value), (form, name)
        # Equal within rounding: torch's order of sums depends on where the loaded tensors happen to lie in memory.
        np.testing.assert_allclose(computed, logits[0], rtol=0, atol=1e-5 * np.abs(logits[0]).max(), err_msg=form)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """Values are asked for when their turn comes, and nobody keeps them."""
    size = 2**20
    tensors = [
        OutputTensor(name=str(i), dtype_name="F32", shape=(size,), nbytes=4 * size, values=lambda: np.ones(size, "f4"))
        for i in range(8)
    ]
    tracemalloc.start()
    try:
        write_files(tmp_path, divide_into_files(tensors, 16 * size))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * 4 * size
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert (read_all(tmp_path)["7"] == 1).all()


def test_parts_on_an_accelerator_are_cut_there(monkeypatch):
    """The same values where no view of a device's memory is to be had."""
    model = jaxmoe.load(GOLDENS / "mixtral" / "original", mesh=mesh_of(1, 2, 4))
    arrays = {path: param.get_value() for path, param in params_by_path(model).items()}
    path = "layers.1.moe.w_gate_up"
    box = ((2, 5), (1, 2), (3, 20), (0, 31))
    expected = np.asarray(arrays[path])[2:5, 1:2, 3:20, 0:31]
    np.testing.assert_array_equal(ModelValues(arrays).read(path, box), expected)
    cut = values._cut
    monkeypatch.setattr(
        values,
        "_fetch",
        lambda data, box: np.asarray(cut(data, np.array([a for a, _ in box], np.int32), tuple(b - a for a, b in box))),
    )
    np.testing.assert_array_equal(ModelValues(arrays).read(path, box), expected)


def test_a_float32_model_is_rounded_when_asked_to(tmp_path):
    """Whether or not its values would survive: that is what the caller asked for, and what config.json then says."""
    source = GOLDENS / "qwen3_moe" / "original"
    jaxmoe.save(jaxmoe.load(source, mesh=mesh_of(1, 2, 2)), tmp_path / "saved", dtype="bfloat16")
    expected = {name: value.astype(ml_dtypes.bfloat16) for name, value in read_all(source).items()}
    saved = read_all(tmp_path / "saved")
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        assert value.dtype == ml_dtypes.bfloat16, name
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_routers_are_rounded_only_where_nothing_changes(tmp_path):
    """A model holds its routers in float32; those of a bfloat16 checkpoint go back to bfloat16."""
    source, mesh = GOLDENS / "qwen3_moe" / "original", mesh_of(1, 1, 2)
    jaxmoe.save(jaxmoe.load(source, mesh=mesh, dtype="bfloat16"), tmp_path / "mixed")
    gates = {name: value.dtype for name, value in read_all(tmp_path / "mixed").items() if value.dtype == "float32"}
    assert gates.keys() == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert json.loads((tmp_path / "mixed" / "config.json").read_text())["dtype"] == "bfloat16"

    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in read_all(source).items()}
    shutil.copytree(source, tmp_path / "bf16")
    write_checkpoint(tmp_path / "bf16", rounded)
    copy_side_files(tmp_path / "mixed", tmp_path / "bf16", dtype=None)
    report = jaxmoe.save(jaxmoe.load(tmp_path / "bf16", mesh=mesh), tmp_path / "again")
    assert report.dtypes.keys() == {"BF16"}
    assert_same_tensors(tmp_path / "again", tmp_path / "bf16")
    assert jaxmoe.convert(tmp_path / "bf16", tmp_path / "wide", dtype="float32").dtypes.keys() == {"F32"}


def test_tensors_that_a_rule_ignores_are_carried_over(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "qwen3_moe" / "original", source)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(4, dtype=np.float64)}
    write_checkpoint(source, read_all(source) | extra)
    model = jaxmoe.load(source, mesh=mesh_of(1, 1, 1), dtype="bfloat16")
    assert jaxmoe.save(model, tmp_path / "saved", form="fused").carried == 1
    assert jaxmoe.convert(source, tmp_path / "converted").carried == 1
    for directory in ("saved", "converted"):
        ((name, value),) = extra.items()
        np.testing.assert_array_equal(read_all(tmp_path / directory)[name], value)
    assert_same_tensors(tmp_path / "converted", source)


def test_a_torch_file_is_converted(tmp_path):
    torch = pytest.importorskip("torch")
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "mixtral" / "original", source)
    # A transposed tensor is stored in another order than its dims.
    tensors = {name: torch.from_numpy(value) for name, value in read_all(source).items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].T.contiguous().T
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    jaxmoe.convert(source, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", GOLDENS / "mixtral" / "original")


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    source = GOLDENS / "qwen3_moe" / "original"
    calls = []

    def fail(done, total):
        calls.append(done)
        assert [path.name[:5] for path in tmp_path.iterdir()] == [".out."]
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jaxmoe.convert(source, tmp_path / "out", max_shard_size="50KB", progress=fail)
    assert len(calls) > 1
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    source = GOLDENS / "qwen3_moe" / "original"
    jaxmoe.convert(source, tmp_path / "out")
    rename = Path.rename

    def fail(self, target):
        if ".partial-" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        jaxmoe.convert(source, tmp_path / "out", form="fused", overwrite=True)
    assert_same_tensors(tmp_path / "out", source)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "qwen3_moe" / "original", source)
    (tmp_path / "empty").mkdir()
    jaxmoe.convert(source, tmp_path / "empty")
    with pytest.raises(FileExistsError, match="written to a new directory; .* is there; overwrite replaces it"):
        jaxmoe.convert(source, tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"replaces a checkpoint, .* has no config\.json and so is none"):
        jaxmoe.convert(source, tmp_path / "mine", overwrite=True)
    with pytest.raises(ValueError, match="not written over a directory that its source is in"):
        jaxmoe.convert(source, tmp_path, overwrite=True)
    # In its own place: the source is read to its end before it goes.
    jaxmoe.convert(source, source, form="fused", overwrite=True)
    assert_same_tensors(source, GOLDENS / "qwen3_moe" / "fused")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine", "source"]


def test_arguments_are_checked(tmp_path):
    source, out = GOLDENS / "qwen3_moe" / "original", tmp_path / "out"
    with pytest.raises(ValueError, match="form is one of per_expert, fused; got 'stacked'"):
        jaxmoe.convert(source, out, form="stacked")
    with pytest.raises(ValueError, match="dtype is float32, bfloat16, .* got 'int8'"):
        jaxmoe.convert(source, out, dtype="int8")
    with pytest.raises(ValueError, match="got 'float7'"):
        jaxmoe.convert(source, out, dtype="float7")
    for size in ("", "5 parsecs", "0GB", -1):
        with pytest.raises(ValueError, match=f'"5GB" or "2GiB"; got {size!r}'):
            jaxmoe.convert(source, out, max_shard_size=size)
    assert [parse_size(size) for size in (7, "1.5kB", "2GiB")] == [7, 1500, 2**31]
    config = get_family("qwen3_moe").read_config(json.loads((source / "config.json").read_text()))
    mesh = jaxmoe.make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"this model has random weights and came from none"):
        jaxmoe.save(Decoder(config, mesh=mesh), out)
    assert not out.exists()


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "mixtral" / "original", source)
    tensors = read_all(source)
    del tensors["lm_head.weight"]
    write_checkpoint(source, tensors | {"stray": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="has 2 problems: tensor 'lm_head.weight' is missing.*'stray'"):
        jaxmoe.convert(source, tmp_path / "out")


def test_the_config_of_dequantized_weights_names_no_quantization(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    text = {"torch_dtype": "float16", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "x", "text_config": text}))
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    (tmp_path / "a" / "optimizer.bin").write_text("large")
    copy_side_files(tmp_path / "a", tmp_path / "b", dtype="bfloat16")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "tokenizer.json"]
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config == {"model_type": "x", "text_config": {"torch_dtype": "bfloat16"}}


SIDE = {
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "tokenizer.model": "pieces",
    "tokenizer_config.json": "{}",
    "encoding_model.py": "pass",
    "LICENSE.md": "free",
}
LEFT = {"README.md": "text", "original/weights.pth": "x", "other.safetensors": "x", "hf_quant_config.json": "{}"}


@pytest.mark.parametrize("saved", [False, True])
def test_side_files_go_along_and_what_does_not_is_told(saved, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "olmoe" / "original", source, ignore=shutil.ignore_patterns("*.npz", "*.md"))
    kept = {path.name for path in source.iterdir()} - {"model.safetensors"}
    for name, text in {**SIDE, **LEFT, ".hidden": "x"}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    if saved:
        report = jaxmoe.save(jaxmoe.load(source, mesh=mesh_of(1, 1, 1)), tmp_path / "out")
    else:
        report = jaxmoe.convert(source, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {*SIDE, *kept, "model.safetensors"}
    assert {name: (tmp_path / "out" / name).read_text() for name in SIDE} == SIDE
    assert report.left_out == ("README.md", "hf_quant_config.json", "original", "other.safetensors")
