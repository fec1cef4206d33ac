"""What a trace, another placement, replicas or more devices change: against brute force, and against plan and search."""

import itertools
import json

import numpy as np
import pytest

from jaxmoe.checkpoint.mapping import abstract_model
from jaxmoe.cli import main
from jaxmoe.hardware import GPUS
from jaxmoe.models import read_model_config
from jaxmoe.placement import ExpertPlacement, RoutingTrace
from jaxmoe.placement.cost import CostModel
from jaxmoe.placement.metrics import evaluate
from jaxmoe.placement.synthetic import synthetic_trace
from jaxmoe.planning import compare_devices, compare_placements, plan, search_meshes, step_time, sweep
from jaxmoe.planning.routing import sent_per_token
from tests.support.published import QWEN3_30B

H100 = GPUS["h100"]
E, K, LAYERS = 16, 2, 3
EXPERT = 3 * 2048 * 768 * 2  # bytes
LENGTH = 1024
EXTRA = 8


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint of which the first layer is dense, so that layers and MoE layers have other numbers."""
    path = tmp_path_factory.mktemp("small")
    sizes = {"num_hidden_layers": LAYERS + 1, "num_experts": E, "num_experts_per_tok": K, "mlp_only_layers": [0]}
    (path / "config.json").write_text(json.dumps(QWEN3_30B | sizes | {"torch_dtype": "bfloat16"}))
    return path


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(num_experts=E, experts_per_token=K, num_layers=LAYERS, num_windows=4, tokens_per_window=64)


def time_on(small, phase, *, batch_size=64, placement="linear", ep=4, **options):
    model = abstract_model(
        read_model_config(small)[1], sizes={"dp": 1, "tp": 1, "ep": ep}, placement=placement, dtype="bfloat16"
    )
    length = LENGTH if phase == "decode" else LENGTH // 2
    return step_time(model, phase, batch_size=batch_size, length=length, gpu=H100, **options)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_trace_of_even_routing_gives_the_time_of_even_routing(small, phase) -> None:
    even = RoutingTrace(counts=np.full((1, LAYERS, E), 7))
    told, assumed = time_on(small, phase, trace=even), time_on(small, phase)
    assert told.experts == pytest.approx(assumed.experts)
    assert told.seconds == pytest.approx(assumed.seconds)


def test_the_time_of_a_prefill_follows_the_skew_of_each_layer(small, trace) -> None:
    metrics = evaluate(
        [ExpertPlacement.linear(E, 4)] * LAYERS, trace, CostModel.for_sizes(hidden_size=1, moe_intermediate_size=1)
    )
    assert len({*metrics.layer_max_over_mean}) == LAYERS
    told, assumed = time_on(small, "prefill", trace=trace), time_on(small, "prefill")
    assert told.experts / assumed.experts == pytest.approx(metrics.layer_max_over_mean.mean())
    # One number for all layers is another way to say it.
    alike = time_on(small, "prefill", skew=metrics.layer_max_over_mean.mean())
    assert alike.experts == pytest.approx(told.experts)


def test_a_decode_step_reads_the_slots_that_its_tokens_are_likely_to_meet(small) -> None:
    counts = np.ones((1, LAYERS, E), int)
    counts[0, 1, :3] = [40, 20, 9]
    hot = [*range(E), 0, 0, 1, -1]  # 20 slots on 4 devices: the first expert thrice
    placement = ExpertPlacement(E, 4, hot)
    most = []
    for layer in range(LAYERS):
        devices = [0.0] * 4
        for slot, expert in enumerate(hot):
            if expert >= 0:
                chance = min(1, K * counts[0, layer, expert] / counts[0, layer].sum()) / hot.count(expert)
                devices[slot // 5] += 1 - (1 - chance) ** 8
        most.append(max(devices))
    told = time_on(small, "decode", batch_size=8, placement=placement, trace=RoutingTrace(counts=counts))
    assert told.experts == pytest.approx(sum(most) * EXPERT / H100.memory_bandwidth)


def test_a_token_is_sent_once_to_each_device_that_has_an_expert_of_it(small) -> None:
    ids = np.array(
        [[[0, 1], [0, 15], [4, 8]], [[4, 5], [12, 13], [0, 4]]]
    )  # [T, L, K]; the tokens live on devices 0 and 2
    trace = RoutingTrace.from_expert_ids(ids, num_experts=E)
    model = abstract_model(read_model_config(small)[1], sizes={"dp": 1, "tp": 1, "ep": 4}, dtype="bfloat16")
    copies = 0
    for token, home in enumerate((0, 2)):
        for layer in range(LAYERS):
            copies += len({expert // 4 for expert in ids[token, layer].tolist()} - {home})
    assert sent_per_token(model, trace) == 2 * copies * 2048 * 2 / 2
    assert sent_per_token(model, RoutingTrace(counts=trace.counts)) is None


@pytest.fixture(scope="module")
def compared(small, trace):
    return compare_placements(
        small, ["linear", "eplb"], redundancy=[0, EXTRA], device="h100", ep=4, trace=trace, max_length=LENGTH
    )


def test_placements_are_those_of_a_plan_with_the_other_half_of_the_trace(compared, small, trace) -> None:
    assert [(choice.placement, choice.redundancy) for choice in compared] == [
        ("linear", 0),
        ("eplb", 0),
        ("linear", EXTRA),
        ("eplb", EXTRA),
    ]
    past, future = trace.halves()
    for choice, slots in ((compared[1], None), (compared[3], E + 4 * EXTRA)):
        placed = ExpertPlacement.from_counts(past.total_counts, ep=4, num_slots=slots)
        planned = plan(small, ep=4, placement=placed, device="h100", batch_size=64, max_length=LENGTH)
        assert choice.bytes_per_device == max(planned.bytes_per_device.values())
        assert choice.largest_batch == planned.largest_batch
        metrics = evaluate(
            placed, RoutingTrace(counts=future.counts), CostModel.for_sizes(hidden_size=1, moe_intermediate_size=1)
        )
        assert choice.skew == pytest.approx(metrics.layer_max_over_mean)
        assert choice.decode == time_on(small, "decode", placement=placed, trace=future)
        assert choice.prefill == time_on(small, "prefill", placement=placed, trace=future)


def test_replicas_level_loads_and_take_room(compared) -> None:
    linear, eplb, _, replicated = compared
    assert np.mean(replicated.skew) < np.mean(eplb.skew) < np.mean(linear.skew)
    assert replicated.prefill.seconds < eplb.prefill.seconds < linear.prefill.seconds
    assert replicated.bytes_per_device - eplb.bytes_per_device == EXTRA * LAYERS * EXPERT
    assert eplb.replica_bytes == 0 < replicated.replica_bytes
    assert replicated.largest_batch < eplb.largest_batch


def test_searches_sweeps_and_plans_place_by_the_trace_too(compared, small, trace) -> None:
    options = {"device": "h100", "placement": "eplb", "trace": trace}
    found = search_meshes(small, 4, batch_size=64, max_length=LENGTH, **options)
    (same,) = (choice for choice in found.choices if choice.mesh["ep"] == 4)
    assert (same.decode, same.prefill) == (compared[1].decode, compared[1].prefill)
    (point,) = sweep(small, ep=4, batch_sizes=[64], lengths=[LENGTH], **options)
    assert point.decode == same.decode
    assert plan(small, ep=4, **options).fits


def test_more_devices_cost_what_their_time_costs(small) -> None:
    choices = compare_devices(small, [1, 2, 4], device="h100", price_per_hour=3.6, batch_size=256, max_length=4096)
    for choice in choices:
        assert (
            choice.best
            == search_meshes(small, choice.devices, device="h100", batch_size=256, max_length=4096).choices[0]
        )
        seconds = choice.best.decode.seconds * 1e6 / 256  # for a million tokens
        assert choice.cost_per_million("decode") == pytest.approx(choice.devices * 3.6 * seconds / 3600)
    assert choices[0].gain is None
    for fewer, more in itertools.pairwise(choices):
        assert more.gain == pytest.approx(fewer.best.decode.seconds / more.best.decode.seconds)
        assert 1 < more.gain < 2


def test_a_number_of_devices_that_is_too_small_has_neither_gain_nor_cost(small) -> None:
    none, some = compare_devices(small, [1, 8], device="h100", price_per_hour=1, batch_size=4096, max_length=1024)
    assert none.best is none.gain is none.tokens_per_second("decode") is none.cost_per_million("decode") is None
    assert some.gain is None
    assert some.cost_per_million("prefill") > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path, trace: search_meshes(path, 2, device="h100", trace=trace, skew=2.0), "leave out skew=2.0"),
        (lambda path, trace: search_meshes(path, 2, device="h100", skew=float("nan")), "at least 1; got nan"),
        (
            lambda path, trace: plan(path, trace=RoutingTrace(counts=trace.counts[:, :2])),
            r"3 layers of \[16\] experts; got 2 layers of 16",
        ),
        (lambda path, trace: plan(path, trace=RoutingTrace(counts=trace.counts[:1])), "a single window of counts"),
        (
            lambda path, trace: compare_placements(path, ["eplb"], device="h100", ep=4),
            "'eplb' is made from expert counts, which are not known here",
        ),
        (
            lambda path, trace: compare_placements(path, ["linear"], device="h100", ep=4, redundancy=[13]),
            "each of 4 that share 16 experts has 4, and can have 12 more; got redundancy=13",
        ),
        (
            lambda path, trace: compare_placements(
                path, {"mine": ExpertPlacement.linear(E, 4)}, device="h100", ep=4, redundancy=[1]
            ),
            "a placement that is made already has its slots",
        ),
        (
            lambda path, trace: compare_devices(path, [2, 2], device="h100"),
            r"each more than the one before; got \[2, 2\]",
        ),
        (
            lambda path, trace: compare_devices(path, [2], device="h100", price_per_hour=0),
            "price_per_hour is a finite number above 0; got 0",
        ),
    ],
)
def test_nonsense_is_refused(small, trace, call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(small, trace)


def test_the_command_tells_the_same(compared, small, trace, tmp_path, capsys) -> None:
    file, page = tmp_path / "trace.npz", tmp_path / "page.html"
    trace.save(file)
    options = ["--device", "h100", "--batch-size", "64", "--max-length", str(LENGTH), "--trace", str(file)]
    both = ["--mesh", "ep=4", "--compare-placements", "linear,eplb", "--redundancy", f"0,{EXTRA}"]
    assert main(["plan", str(small), *options, *both, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["placements"] == json.loads(
        json.dumps([choice.to_dict() for choice in compared])
    )
    numbers = ["--devices", "2,4", "--placement", "eplb", "--price-per-hour", "2", "--html", str(page)]
    assert main(["plan", str(small), *options, *numbers]) == 0
    shown = capsys.readouterr().out
    expected = compare_devices(
        small, [2, 4], device="h100", price_per_hour=2, placement="eplb", trace=trace, batch_size=64, max_length=LENGTH
    )
    for text in (shown, page.read_text()):
        assert f"{expected[1].gain - 1:+.0%}" in text
        assert f"{expected[1].cost_per_million('decode'):.3f}" in text
    assert page.read_text().count("<svg") == 3
    for wrong, message in (
        (["--trace", str(file)], "name it with --device"),
        (["--price-per-hour", "2"], "--price-per-hour is for --devices"),
        (["--device", "h100", "--redundancy", "1", "--adapter", "sql=there"], "leave --adapter and --activations out"),
        (["--device", "h100", "--trace", "nowhere.npz"], "the trace nowhere.npz is no file"),
        (["--device", "h100", "--placement", "eplb", "--compare-placements", "linear"], "leave --placement out"),
        (["--device", "h100", "--devices", "2", "--compare-placements", "mine.json"], "give a --mesh with it"),
    ):
        assert main(["plan", str(small), *wrong]) == 1
        assert message in capsys.readouterr().err
