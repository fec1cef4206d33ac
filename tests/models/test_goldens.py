"""Every family against what transformers computed, on every mesh: logits, greedy tokens, both checkpoint forms."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import jaxmoe
from jaxmoe.layers import params_by_path
from jaxmoe.planning.memory import CACHE
from tests.support import runs
from tests.support.covering import pairs
from tests.support.families import EVERY_KIND, FAMILIES, NEW_TOKENS, ON_EVERY_MESH
from tests.support.goldens import GOLDENS, check_alone, check_greedy, check_logits, check_same_parameters, read_expected
from tests.support.meshes import MESH_SHAPES, mesh_id, mesh_of

pytestmark = pytest.mark.covering

# On every mesh, where every two of a family, a mesh and a placement meet. With ep=1 every placement is the same.
MEETINGS = pairs(ON_EVERY_MESH, ["linear", "round_robin"], MESH_SHAPES)

# Where transformers is at hand, tests/parity compares on (2, 2, 2) with it, and one family of each kind does for a single
# device: the short run has all of them there.
CASES = [
    (family, placement, shape)
    for family in FAMILIES
    for placement, shape in (
        [("linear", (1, 1, 1)), *((placement, shape) for name, placement, shape in MEETINGS if name == family)]
        if family in ON_EVERY_MESH
        else [
            *([("linear", (1, 1, 1))] if not runs.live or family in EVERY_KIND else []),
            *([] if runs.live else [("round_robin", (2, 2, 2))]),
            ("linear", (1, 2, 4)),
        ]
    )
]


# Of these the short run generates as well: windows and sinks, a latent cache, and a recurrent state.
GREEDY = ("gpt_oss", "deepseek_v3", "qwen3_next")


def generates(family, mesh_shape) -> bool:
    """In the full run one family of each kind generates everywhere, as it does live, and the others on one mesh."""
    if runs.full:
        return family in EVERY_KIND or mesh_shape == (1, 2, 4)
    return family in GREEDY and mesh_shape == (1, 1, 1)


@pytest.mark.parametrize(("family", "placement", "mesh_shape"), CASES, ids=mesh_id)
def test_logits_and_greedy_tokens(family, placement, mesh_shape):
    expected = read_expected(family)
    mesh = mesh_of(*mesh_shape)
    model = jaxmoe.load(GOLDENS / family / "original", mesh=mesh, placement=placement, check_finite=True)
    report = model.load_report
    assert report.bytes_read == report.bytes_needed
    assert len(set(report.expert_bytes_per_device.values())) == 1
    planned = jaxmoe.plan(GOLDENS / family / "original", **mesh.shape, placement=placement)
    parameters = {device: held - planned.parts[CACHE][device] for device, held in planned.held_per_device.items()}
    assert [*parameters.values()] == [report.bytes_per_device[device.id] for device in mesh.devices.flat]
    check_logits(model, expected)
    if generates(family, mesh_shape):
        check_greedy(model, expected)
    assert len(expected["greedy"][0]) == NEW_TOKENS


@pytest.mark.full
@pytest.mark.parametrize("family", EVERY_KIND)
def test_a_prompt_alone(family):
    check_alone(jaxmoe.load(GOLDENS / family / "original", mesh=mesh_of(2, 2, 2)), read_expected(family))


@pytest.mark.full
@pytest.mark.parametrize("dispatch", ["replicated", "all_gather", "all_to_all"])
@pytest.mark.parametrize("expert_axes", [("ep",), ("ep", "tp"), ("dp", "ep")])
def test_every_dispatch_and_expert_axes(dispatch, expert_axes):
    expected = read_expected("qwen3_moe")
    model = jaxmoe.load(
        GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(2, 2, 2), dispatch=dispatch, expert_axes=expert_axes
    )
    check_logits(model, expected)


# Which bytes a device reads of a matrix depends on its shape and the mesh, and not on the family. On (2, 2, 2), tests/parity
# compares both forms of every family, where transformers is at hand.
@pytest.mark.parametrize(
    ("family", "mesh_shape"),
    [
        (family, shape)
        for family in FAMILIES
        if (GOLDENS / family / "fused").is_dir()
        for shape in (
            [(1, 1, 1), *MESH_SHAPES] if family in ON_EVERY_MESH else [(1, 2, 4), *([] if runs.live else [(2, 2, 2)])]
        )
    ],
    ids=mesh_id,
)
def test_fused_and_sharded_form_is_the_same_model(family, mesh_shape):
    mesh = mesh_of(*mesh_shape)
    original, fused = (
        jaxmoe.load(GOLDENS / family / form, mesh=mesh, placement="round_robin") for form in ("original", "fused")
    )
    check_same_parameters(original, fused)
    assert fused.load_report.bytes_read == fused.load_report.bytes_needed == original.load_report.bytes_read


@pytest.mark.full
def test_bfloat16_follows_float32():
    expected = read_expected("qwen3_moe")
    model = jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 2, 4), dtype="bfloat16")
    assert all(
        param[...].dtype == ("float32" if path.endswith("w_router") else "bfloat16")
        for path, param in params_by_path(model).items()
    )
    logits = np.asarray(model(expected["prompt"][0][None]))[0]
    assert np.corrcoef(logits.ravel(), expected["logits"][0].ravel())[0, 1] > 0.98


def test_experts_are_never_gathered():
    """The compiled prefill of a model on ep=4 holds a quarter of the experts and moves none."""
    from flax import nnx

    model = jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 2, 4))
    graphdef, state = nnx.split(model)
    cache = model.init_cache(4, 32)
    compiled = (
        jax.jit(lambda state, *args: nnx.merge(graphdef, state).prefill(*args))
        .lower(state, np.zeros((4, 16), np.int32), np.full(4, 16, np.int32), cache)
        .compile()
    )
    text = compiled.as_text()
    assert "f32[3,2,12,32]" in text  # 3 of 12 slots, half the width
    for whole in ("f32[12,2,12,32]", "f32[12,2,24,32]", "f32[3,2,24,32]", "f32[12,32,24]", "f32[12,32,12]"):
        assert whole not in text


def test_layers_behind_the_models_own_are_ignored_by_name(tmp_path):
    """Multi-token-prediction layers; what no rule names is still refused."""
    shutil.copytree(GOLDENS / "glm4_moe" / "original", tmp_path / "glm")
    save_file({"model.layers.2.eh_proj.weight": np.ones((2, 2), np.float32)}, tmp_path / "glm" / "mtp.safetensors")
    names = {}
    for file in ("model.safetensors", "mtp.safetensors"):
        with safe_open(tmp_path / "glm" / file, "np") as opened:
            names |= dict.fromkeys(opened.keys(), file)
    index = tmp_path / "glm" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    model = jaxmoe.load(tmp_path / "glm", mesh=mesh_of(1, 1, 1))
    assert model.load_report.ignored == {"multi-token prediction": ("model.layers.2.eh_proj.weight",)}
    save_file({"model.layers.3.eh_proj.weight": np.ones((2, 2), np.float32)}, tmp_path / "glm" / "mtp.safetensors")
    names = {name.replace("layers.2.eh", "layers.3.eh"): file for name, file in names.items()}
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ValueError, match=r"layers\.3\.eh_proj.*no rule ignores it"):
        jaxmoe.load(tmp_path / "glm", mesh=mesh_of(1, 1, 1))
