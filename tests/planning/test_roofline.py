"""The modeled time of a step: each part against its own formula, and what has to follow whatever the rates are."""

import dataclasses
import json

import pytest

from jaxmoe.checkpoint.mapping import abstract_model
from jaxmoe.hardware import GPUS
from jaxmoe.models import get_family, read_model_config
from jaxmoe.planning import step_time
from tests.support.published import QWEN3_30B

H100 = GPUS["h100"]
QWEN = get_family("qwen3_moe").read_config(QWEN3_30B | {"num_hidden_layers": 2, "torch_dtype": "bfloat16"})


def model_on(dp=1, tp=1, ep=1, **options):
    return abstract_model(QWEN, sizes={"dp": dp, "tp": tp, "ep": ep}, dtype="bfloat16", **options)


def time_on(phase="decode", *, batch_size=64, length=2048, gpu=H100, nodes_of=8, dispatch="auto", skew=1.0, **mesh):
    return step_time(
        model_on(**mesh),
        phase,
        batch_size=batch_size,
        length=length,
        gpu=gpu,
        devices_per_node=nodes_of,
        dispatch=dispatch,
        skew=skew,
    )


def test_experts_of_one_device_are_read_where_they_are_met() -> None:
    expert = 3 * 2048 * 768 * 2
    # One token meets 8 of them, and a large batch all 128.
    assert time_on(batch_size=1).experts == pytest.approx(2 * 8 * expert / H100.memory_bandwidth)
    met = 128 * (1 - (1 - 8 / 128) ** 64)
    assert time_on().experts == pytest.approx(2 * met * expert / H100.memory_bandwidth)
    rows = 8 * 2048 * 8
    assert time_on("prefill", batch_size=8).experts == pytest.approx(2 * rows * 6 * 2048 * 768 / H100.flops)


def test_a_token_is_one_replica_of_the_models_whole() -> None:
    """Eight replicas leave seven of them idle at batch size 1; the eighth reads what a single one reads."""
    assert time_on(batch_size=1, dp=8).experts == pytest.approx(time_on(batch_size=1).experts)
    assert time_on(batch_size=9, dp=8).experts == pytest.approx(time_on(batch_size=2).experts)


def test_every_way_of_sharing_the_experts_gives_a_device_the_same_share_of_their_work() -> None:
    alike = [
        time_on("prefill", ep=8),
        time_on("prefill", tp=8),
        time_on("prefill", tp=2, ep=4),
        time_on("prefill", dp=2, ep=4, expert_axes=("dp", "ep")),
        time_on("prefill", tp=2, ep=4, expert_axes=("ep", "tp")),
    ]
    assert {round(one.experts * 1e9) for one in alike} == {round(alike[0].experts * 1e9)}
    # Replicas of the model read their experts each, for half of the tokens.
    assert time_on(dp=2, ep=4).experts > time_on(ep=8).experts


def test_cache_is_read_and_attention_shares_it_over_all_devices() -> None:
    cache = 64 * 2049 * 2 * 2 * 4 * 128 * 2  # keys and values, layers, heads, width, bytes
    scores = 64 * 2049 * 2 * 32 * 2 * (4 + 2)  # layers, heads, written and read, a score and its share of the softmax
    assert time_on(length=2049).cache == pytest.approx((cache + scores) / H100.memory_bandwidth)
    for mesh in ({"ep": 4}, {"tp": 4}, {"dp": 2, "tp": 2}):
        assert time_on(length=2049, **mesh).cache == pytest.approx((cache + scores) / 4 / H100.memory_bandwidth)
    # With more tp ranks than heads of keys each rank has a whole one.
    assert time_on(length=2049, tp=8).cache == pytest.approx((cache / 4 + scores / 8) / H100.memory_bandwidth)


def test_a_prefill_has_the_scores_of_all_pairs() -> None:
    once, twice = (time_on("prefill", batch_size=1, length=length).cache for length in (4096, 8192))
    assert once == pytest.approx(4096**2 * 2 * 32 * 2 * (4 + 2) / H100.memory_bandwidth, rel=0.01)
    assert twice == pytest.approx(4 * once, rel=0.01)


def test_one_device_sends_nothing() -> None:
    alone = time_on()
    assert alone.exchange < 1e-5  # moves within its own memory
    assert alone.sums == 0
    assert time_on(tp=2).sums > 0
    assert time_on(ep=2).exchange > alone.exchange
    assert time_on(ep=2).sums == 0


def test_a_group_across_nodes_takes_the_slower_links() -> None:
    within, across = (time_on("prefill", ep=8, nodes_of=size, dispatch="all_to_all") for size in (8, 4))
    assert across.exchange > 2 * within.exchange
    # Of (dp, tp, ep) the last is within a node, and replicas of a model send each other nothing.
    assert time_on("prefill", dp=2, ep=4, nodes_of=4).exchange == time_on("prefill", dp=2, ep=4, nodes_of=8).exchange
    assert time_on(dp=2, tp=4, nodes_of=4).sums == time_on(dp=2, tp=4, nodes_of=8).sums
    assert time_on(tp=8, nodes_of=4).sums > time_on(tp=8, nodes_of=8).sums


def test_terms_add_up_and_skew_slows_experts_alone() -> None:
    even, skewed = (time_on("prefill", ep=8, skew=skew) for skew in (1.0, 3.0))
    assert sum(even.terms().values()) == pytest.approx(even.seconds)
    assert list(even.terms().values()) == sorted(even.terms().values(), reverse=True)
    assert skewed.experts == pytest.approx(3 * even.experts)
    assert dataclasses.replace(skewed, experts=0.0) == dataclasses.replace(even, experts=0.0)
    assert even.tokens_per_second == pytest.approx(64 * 2048 / even.seconds)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_faster_device_is_faster(phase) -> None:
    faster = dataclasses.replace(H100, memory_bandwidth=2 * H100.memory_bandwidth, flops=2 * H100.flops)
    ours, theirs = (time_on(phase, gpu=gpu) for gpu in (H100, faster))
    assert theirs.seconds == pytest.approx(ours.seconds / 2)


def test_every_kind_of_layer_has_a_time(tmp_path) -> None:
    from tests.support.families import EVERY_KIND
    from tests.support.goldens import GOLDENS

    for family in EVERY_KIND:
        config = json.loads((GOLDENS / family / "original" / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = abstract_model(read_model_config(tmp_path)[1], sizes={"dp": 2, "tp": 2, "ep": 2})
        for phase in ("prefill", "decode"):
            time = step_time(model, phase, batch_size=4, length=16, gpu=H100)
            assert all(seconds > 0 for seconds in time.terms().values()), (family, time)
