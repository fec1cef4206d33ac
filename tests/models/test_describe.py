"""A dispatch for each phase, and what a model says of itself."""

import json
import re

import pytest

import jaxmoe
from jaxmoe.cli import main
from jaxmoe.dispatch import PhaseDispatch
from jaxmoe.layers.moe import MoE
from jaxmoe.models import routing
from tests.support.goldens import GOLDENS, check_greedy, read_expected
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import CASES, write_pair

QWEN = GOLDENS / "qwen3_moe" / "original"


@pytest.mark.full
def test_phases_take_their_own_dispatch(monkeypatch) -> None:
    used, plan = [], MoE._plan

    def noting(self, T, dtype, dispatch=None):
        made = plan(self, T, dtype, dispatch)
        used.append((T, made.dispatch.name))
        return made

    monkeypatch.setattr(MoE, "_plan", noting)
    model = jaxmoe.load(QWEN, mesh=mesh_of(1, 2, 4), dispatch={"prefill": "all_to_all", "decode": "all_gather"})
    check_greedy(model, read_expected("qwen3_moe"))
    # A decode step has a token a row.
    rows = {model.padded_batch(1), model.padded_batch(5)}
    assert {name for T, name in used if T in rows} == {"all_gather"}
    assert {name for T, name in used if T not in rows} == {"all_to_all"}


def test_one_phase_may_be_left_to_auto() -> None:
    assert PhaseDispatch.of({"decode": "replicated"}) == PhaseDispatch(prefill="auto", decode="replicated")
    assert PhaseDispatch.of("all_gather") == PhaseDispatch(prefill="all_gather", decode="all_gather")
    with pytest.raises(ValueError, match=r'names by phase, "prefill" and "decode"; got \'training\''):
        PhaseDispatch.of({"training": "all_to_all"})


@pytest.mark.parametrize("dispatch", ["nowhere", {"decode": "nowhere"}], ids=str)
def test_unknown_backends_are_refused_at_once(dispatch) -> None:
    with pytest.raises(ValueError, match=r"dispatch backends are auto, replicated, .* got 'nowhere'"):
        jaxmoe.load(QWEN, mesh=mesh_of(1, 1, 4), dispatch=dispatch)


@pytest.mark.full
@pytest.mark.parametrize("how", ["keep", "dequantize"])
def test_a_quantized_model_says_what_it_holds_in_which_form(how, tmp_path, capsys) -> None:
    family, form, block = next(case for case in CASES if case[:2] == ("qwen3_moe", "fp8_block"))
    quantized, _, count = write_pair(tmp_path, family, form, block)
    model = jaxmoe.load(quantized, mesh=mesh_of(1, 2, 1), dtype="float32", quantized=how)
    report, text = model.load_report, model.describe()
    assert report.held == jaxmoe.plan(quantized, tp=2, dtype="float32", quantized=how).held
    held = "float8_e4m3fn, float32 scales of 8 x 8"
    packed = f"held packed: attention as {held} (4 of 8 matrices); routed experts as {held}; other weights in float32"
    assert (packed in text.splitlines()) == (how == "keep")
    assert (held in text) == (how == "keep")
    line, *others = report.describe().splitlines()[1:]
    assert (
        line == f"{'kept packed' if how == 'keep' else 'decoded'}: {count} weights in fp8_block (block_size (24, 40))"
    )
    asked = "the checkpoint asks for activations in fp8 with a scale for each 40 inputs"
    assert [other.partition(" (")[0] for other in others] == [asked]

    command = ["generate", str(quantized), "--mesh", "tp=2,ep=4", "--prompt-ids", "5", "--max-new-tokens", "1", "-v"]
    if how == "keep":
        assert main([*command, "--dtype", "float32", "--quantized", how]) == 0
        assert {packed, line} <= set(capsys.readouterr().err.splitlines())


def test_what_is_decoded_is_named_with_the_reason(tmp_path) -> None:
    family, form, block = next(case for case in CASES if case[1] == "gptq, order")
    quantized, _, _ = write_pair(tmp_path, family, form, block)
    report = jaxmoe.load(quantized, mesh=mesh_of(1, 1, 2), dtype="float32").load_report
    assert report.describe().splitlines()[-1] == (
        "8 quantized parameters are decoded (layers.*.attention.w_o, layers.*.attention.w_q, layers.*.moe.w_down, "
        "layers.*.moe.w_gate_up): gptq (group_size 32, act_order True) does not stay packed"
    )


def test_what_a_model_says_of_itself() -> None:
    placement = jaxmoe.ExpertPlacement(11, 4, [*range(11), 0, 1, -1, -1, -1])
    model = jaxmoe.load(
        QWEN,
        mesh=mesh_of(1, 2, 4),
        placement=["linear", placement],
        dispatch={"prefill": "auto", "decode": "replicated"},
    )
    text = model.describe(batch_size=4, prompt_length=256)
    assert text.splitlines()[:5] == [
        "qwen3_moe in float32, 2 layers, 2 of them with routed experts",
        "mesh dp=1, tp=2, ep=4: 8 cpu devices",
        "kernels: portable for experts (it runs everywhere, and no other was tried here)",
        "MoE layer 0: 11 experts, 3 to a token, in 12 slots (0 replicas, 1 padding), 3 on each of 4 devices along ep",
        "MoE layer 1: 11 experts, 3 to a token, in 16 slots (2 replicas, 3 padding), 4 on each of 4 devices along ep",
    ]
    # The choice and its reasons are those of the layer.
    assert f"prefill: {model.moe_layers[0].explain_dispatch(1024, 'float32')}" in text.replace("MoE layer 0: ", "")
    assert text.endswith("decode: replicated, as it was asked for")


@pytest.mark.full
def test_the_command_tells_the_choices_it_makes(capsys, monkeypatch) -> None:
    """For the rows and lengths that are computed: 3 prompts of up to 17 tokens are 4 rows of 32."""
    used, plan = set(), MoE._plan

    def noting(self, T, dtype, dispatch=None):
        used.add(T)
        return plan(self, T, dtype, dispatch)

    monkeypatch.setattr(MoE, "_plan", noting)
    prompts = ["--prompt-ids", ",".join(["5"] * 17), "--prompt-ids", "6,7", "--prompt-ids", "8"]
    command = ["generate", str(QWEN), "--mesh", "tp=2,ep=4", *prompts, "-v", "--max-new-tokens", "4", "--ignore-eos"]
    assert main(command) == 0
    assert used == {4 * 32, 4}
    told = re.findall(r"(prefill|decode): \w+ for (\d+) tokens", capsys.readouterr().err)
    assert told == [("prefill", "128"), ("decode", "4")]


@pytest.mark.full
def test_the_command_takes_a_dispatch_for_each_phase(capsys) -> None:
    options = ["generate", str(QWEN), "--mesh", "ep=8", "--prompt-ids", "5,6,7", "--max-new-tokens", "4", "--json"]
    tokens = []
    for dispatch in ("auto", "prefill=all_to_all,decode=replicated"):
        assert main([*options, "--dispatch", dispatch]) == 0
        tokens.append(json.loads(capsys.readouterr().out.splitlines()[0])["token_ids"])
    assert tokens[0] == tokens[1]
    with pytest.raises(SystemExit) as error:
        main([*options, "--dispatch", "prefill=all_to_all,training=x"])
    assert error.value.code == 2
    assert "a name, or prefill=NAME,decode=NAME" in capsys.readouterr().err


@pytest.mark.full
def test_the_command_records_routing_for_place(tmp_path, capsys, monkeypatch) -> None:
    trace, placement = tmp_path / "routing.npz", tmp_path / "placement.json"
    command = ["generate", str(QWEN), "--mesh", "tp=2,ep=4", "--prompt-ids", "5,6,7", "--prompt-ids", "8,9", "-v"]
    assert main([*command, "--max-new-tokens", "8", "--ignore-eos", "--record-routing", str(trace)]) == 0
    assert "11 experts, 3 to a token" in capsys.readouterr().err
    assert jaxmoe.RoutingTrace.load(trace).window_sizes.tolist() == [5, *[2] * 7]
    assert [path.name for path in tmp_path.iterdir()] == ["routing.npz"]
    assert main(["place", str(trace), "--config", str(QWEN), "--ep", "4", "-o", str(placement)]) == 0
    assert main([*command, "--max-new-tokens", "8", "--placement", str(placement)]) == 0
    # Room for the first two steps: of 5 and 2 tokens, 2 layers and 3 choices.
    monkeypatch.setattr(routing, "MOST_BYTES", (5 + 2) * 2 * 3 * 4)
    capsys.readouterr()
    assert main([*command, "--max-new-tokens", "8", "--ignore-eos", "--record-routing", str(trace)]) == 0
    assert (
        "routing.npz has the first 2 of 8 steps: choices of tokens are kept up to 168 bytes" in capsys.readouterr().err
    )
    assert jaxmoe.RoutingTrace.load(trace).window_sizes.tolist() == [5, 2]


@pytest.mark.full
def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path, capsys) -> None:
    trace = tmp_path / "missing" / "routing.npz"
    command = ["generate", str(QWEN), "--mesh", "tp=2,ep=4", "--prompt-ids", "5", "--max-new-tokens", "2"]
    assert main([*command, "--record-routing", str(trace)]) == 1
    assert "missing" in capsys.readouterr().err
