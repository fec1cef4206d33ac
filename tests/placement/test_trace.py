"""Routing traces: counting, halving, saving, and what other programs record."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.placement import RoutingTrace
from jaxmoe.placement.coactivation import coactivation, transitions
from jaxmoe.placement.synthetic import synthetic_trace
from jaxmoe.placement.trace_formats import from_megatron, from_sglang, from_vllm, read_trace

IDS = np.array([[[0, 1], [2, 3]], [[1, 2], [3, -1]], [[0, 3], [0, 1]]], np.int16)


def same(first: RoutingTrace, second: RoutingTrace) -> bool:
    pairs = [(getattr(first, name), getattr(second, name)) for name in ("counts", "expert_ids", "window_sizes")]
    return all((a is None and b is None) or np.array_equal(a, b) for a, b in pairs)


def test_ids_are_counted_by_window_and_layer() -> None:
    trace = RoutingTrace.from_expert_ids(IDS, 4, window=2)
    assert trace.counts.tolist() == [[[1, 2, 1, 0], [0, 0, 1, 2]], [[1, 0, 0, 1], [1, 1, 0, 0]]]
    assert (trace.num_windows, trace.num_layers, trace.num_experts) == (2, 2, 4)
    assert trace.window_sizes.tolist() == [2, 1]
    assert trace.window_of_token.tolist() == [0, 0, 1]
    assert trace.total_counts.tolist() == trace.counts.sum(axis=0).tolist()


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_counts_are_those_of_a_plain_loop(tokens, layers, num_experts, window, seed) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, num_experts, (tokens, layers, 2))
    trace = RoutingTrace.from_expert_ids(ids, num_experts, window=window)
    expected = np.zeros_like(trace.counts)
    for token, layer, choice in np.ndindex(ids.shape):
        if ids[token, layer, choice] >= 0:
            expected[token // window, layer, ids[token, layer, choice]] += 1
    assert np.array_equal(trace.counts, expected)


def test_halves_are_the_past_and_the_future() -> None:
    trace = synthetic_trace(num_experts=8, experts_per_token=2, num_windows=5, tokens_per_window=32)
    past, future = trace.halves()
    assert (past.num_windows, future.num_windows) == (3, 2)
    assert np.array_equal(np.concatenate([past.expert_ids, future.expert_ids]), trace.expert_ids)
    assert np.array_equal(np.concatenate([past.counts, future.counts]), trace.counts)
    counts_past, counts_future = RoutingTrace(counts=trace.counts).halves()
    assert np.array_equal(counts_past.counts, past.counts)
    assert np.array_equal(counts_future.counts, future.counts)


def test_traces_are_joined() -> None:
    trace = RoutingTrace.from_expert_ids(IDS, 4, window=1)
    assert same(RoutingTrace.joined(trace.halves()), trace)
    counts = RoutingTrace(counts=trace.counts)
    assert same(RoutingTrace.joined(counts.halves()), counts)
    for others in ([], [trace, counts], [trace, RoutingTrace(counts=trace.counts[:, :1])]):
        with pytest.raises(ValueError, match="traces that are joined are of the same layers"):
            RoutingTrace.joined(others)


def test_a_single_window_is_halved_by_tokens() -> None:
    past, future = RoutingTrace.from_expert_ids(IDS, 4).halves()
    assert (past.expert_ids.shape[0], future.expert_ids.shape[0]) == (2, 1)
    with pytest.raises(ValueError, match="a single window of counts"):
        RoutingTrace(counts=np.ones((1, 1, 4), np.int64)).halves()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"counts": np.ones((1, 1, 2))}, "counts is an integer array of 3 dims; got float64"),
        ({"counts": np.ones((1, 2), int)}, "3 dims"),
        ({"counts": np.ones((0, 1, 2), int)}, "at least one window"),
        ({"counts": -np.ones((1, 1, 2), int)}, "at least 0; got -1"),
        ({"counts": np.ones((1, 1, 2), int), "window_sizes": np.array([1])}, "come together"),
    ],
)
def test_counts_that_do_not_fit_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingTrace(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ids": IDS[:, :1]}, "got 1 layers"),
        ({"window_sizes": np.array([3])}, "1 sizes"),
        ({"window_sizes": np.array([2, 2])}, "add up to the 3 tokens"),
        ({"window_sizes": np.array([4, -1])}, "add up to the 3 tokens"),
        ({"expert_ids": IDS + 4}, r"expert ids are 0..3, or -1 for no choice; got 7"),
        ({"expert_ids": IDS - 1}, "or -1 for no choice; got -2"),
        ({"expert_ids": IDS[::-1]}, "counts are not those of expert_ids"),
    ],
)
def test_ids_that_do_not_fit_are_refused(change, message) -> None:
    trace = RoutingTrace.from_expert_ids(IDS, 4, window=2)
    fields = {"counts": trace.counts, "expert_ids": trace.expert_ids, "window_sizes": trace.window_sizes}
    with pytest.raises(ValueError, match=message):
        RoutingTrace(**(fields | change))


@pytest.mark.parametrize("with_ids", [True, False])
def test_save_and_load(tmp_path, with_ids) -> None:
    trace = RoutingTrace.from_expert_ids(IDS, 4, window=2)
    if not with_ids:
        trace = RoutingTrace(counts=trace.counts)
    path = tmp_path / "no suffix of NumPy's own"
    trace.save(path)
    assert same(RoutingTrace.load(path), trace)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a trace file ran code",))


FORMAT = {"format": np.array("jaxmoe.routing_trace"), "version": np.array(1)}
COUNTS = np.ones((1, 1, 2), np.int64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no routing trace"),
        ({"counts": COUNTS}, "no routing trace"),
        (FORMAT | {"version": np.array(2), "counts": COUNTS}, "version 1 are known here"),
        (FORMAT, "has counts, .* has nothing"),
        (FORMAT | {"counts": COUNTS, "extra": COUNTS}, "has counts, .* has counts, extra"),
        (FORMAT | {"counts": COUNTS.astype(np.float32)}, "integer array"),
        (FORMAT | {"counts": np.array([Bomb()], object)}, "something other than arrays"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, fields, message) -> None:
    path = tmp_path / "trace.npz"
    np.savez(path, **fields)
    with pytest.raises(ValueError, match=message):
        RoutingTrace.load(path)


def test_a_damaged_file_is_refused(tmp_path) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"is no \.npz file"):
        RoutingTrace.load(path)
    synthetic_trace(num_experts=8, experts_per_token=2).save(path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="damaged"):
        RoutingTrace.load(path)
    with pytest.raises(FileNotFoundError):
        RoutingTrace.load(tmp_path / "absent.npz")


def test_synthetic_traces_are_skewed_and_repeatable() -> None:
    sizes = {"num_experts": 32, "experts_per_token": 4, "num_layers": 2, "num_windows": 4, "tokens_per_window": 250}
    trace = synthetic_trace(**sizes, seed=1)
    assert trace.expert_ids.shape == (1000, 2, 4)
    assert same(trace, synthetic_trace(**sizes, seed=1))
    assert not same(trace, synthetic_trace(**sizes, seed=2))
    # A router chooses an expert at most once for a token.
    assert (np.diff(np.sort(trace.expert_ids, axis=2), axis=2) > 0).all()
    assert trace.total_counts.max() > 2 * trace.total_counts.mean()
    flat = synthetic_trace(**sizes, popularity=0, topicality=0)
    assert flat.total_counts.max() < 1.5 * flat.total_counts.mean()


def test_pairs_are_counted() -> None:
    assert coactivation(IDS[:, 0], 4).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    follow = transitions(IDS[:, 0], IDS[:, 1], 4)
    assert follow.sum() == 4 + 2 + 4
    assert follow[1].tolist() == [0, 0, 1, 2]


# --- vLLM


def test_vllm_requests_are_joined() -> None:
    cached = np.full((2, 2, 2), -1, np.int16)
    trace = from_vllm([np.concatenate([cached, IDS[:1]]), IDS[1:]], num_experts=4, window=2)
    assert same(trace, RoutingTrace.from_expert_ids(IDS, 4, window=2))


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([IDS, IDS[:, :1]], "same layers and K"),
        ([IDS[0]], r"are \[tokens, layers, K\]"),
        ([], "same layers and K"),
        ([np.full((1, 2, 2), -1)], "no token .* has a recorded expert"),
        ([IDS + 1], r"expert ids are 0..3"),
    ],
)
def test_vllm_arrays_that_do_not_fit_are_refused(requests, message) -> None:
    with pytest.raises(ValueError, match=message):
        from_vllm(requests, num_experts=4)


# --- Megatron-LM


def megatron(step: int, layer: int, ids: list, rank: int = 0, **more) -> dict:
    shape = {"num_tokens": len(ids), "topk": len(ids[0])}
    record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
    return record | shape | {"top_indices": ids} | more


def test_megatron_records_become_windows() -> None:
    records = [
        megatron(7, 1, [[0, 1]]),
        megatron(7, 4, [[2, 3]]),
        megatron(7, 1, [[1, 2]], rank=1),
        megatron(7, 4, [[3, 0]], rank=1),
        megatron(8, 1, [[0, 3]]),
        megatron(8, 1, [[2, 3]]),  # A second micro-batch of the step.
        megatron(8, 4, [[0, 1]]),
        megatron(8, 4, [[1, 0]]),
        megatron(8, 0, [[1, 1]], block="mtp", mtp_idx=0),
    ]
    trace = from_megatron(records, num_experts=4)
    assert trace.window_sizes.tolist() == [2, 2]
    assert trace.expert_ids.tolist() == [[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[0, 3], [0, 1]], [[2, 3], [1, 0]]]
    assert from_megatron(records, num_experts=4, block="mtp").counts.tolist() == [[[0, 2, 0, 0]]]


def test_megatron_pipeline_ranks_leave_counts() -> None:
    trace = from_megatron([megatron(0, 1, [[0, 1]]), megatron(0, 5, [[2, 2]], rank=1)], num_experts=4)
    assert trace.expert_ids is None
    assert trace.counts.tolist() == [[[1, 1, 0, 0], [0, 0, 2, 0]]]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no record of block 'decoder'"),
        ([{"step": 0}], "record 1 is none of a router trace: KeyError"),
        ([megatron(0, 1, [[0, 9]])], "record 1 has shape .* ids 0..9"),
        ([megatron(0, 1, [[0]]), megatron(0, 1, [[0, 1]])], "same number of experts per token"),
        ([megatron(0, 1, [["a"]])], r"record 1 has shape \(1, 1\)"),
        ([megatron(0, 1, [[0.7, 1.2]])], "record 1 has shape .* ids 0.7..1.2"),
        ([megatron(0, 1, [[0], [1, 2]])], "record 1 is none"),
    ],
)
def test_megatron_records_that_do_not_fit_are_refused(records, message) -> None:
    with pytest.raises(ValueError, match=message):
        from_megatron(records, num_experts=4)


# --- SGLang


def test_sglang_counts() -> None:
    # A dense first layer, and a pass that the buffer never reached.
    counts = np.array([[[0, 0], [3, 1]], [[0, 0], [0, 0]], [[0, 0], [2, 2]]], np.int32)
    trace = from_sglang({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None})
    assert trace.counts.tolist() == [[[3, 1]], [[2, 2]]]


def sglang(number: int, rank: int, ids_LTK: list) -> dict:
    ids = np.array(ids_LTK, np.int32)
    return {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary", "topk_ids_of_layer": ids}


def test_sglang_tokens_are_brought_back_to_logical_ids() -> None:
    dense = [[-1] * 8]
    padded = [*([-1] * 6)]
    # Physical experts 0..3 of layer 1 are the logical 2, 0, 1, 2.
    to_logical = np.array([[0, 1, 2, 0], [2, 0, 1, 2]])
    dumps = [
        {
            "records": [
                sglang(4, 0, [dense * 2, [[0, 1, *padded], [-1] * 8]]),
                sglang(3, 0, [dense, [[2, 3, *padded]]]),
            ],
            "last_physical_to_logical_map": to_logical,
        },
        {"records": [sglang(4, 1, [dense, [[3, 2, *padded]]])], "last_physical_to_logical_map": to_logical},
    ]
    trace = from_sglang(dumps)
    assert trace.num_experts == 3
    assert trace.window_sizes.tolist() == [1, 2]
    assert trace.expert_ids.tolist() == [[[1, 2]], [[2, 0]], [[2, 1]]]


def test_sglang_passes_without_tokens() -> None:
    record = {"forward_pass_id": 0, "rank": 0, "global_physical_count": np.array([[0, 0, 0], [5, 1, 2]])}
    dump = {"records": [record, record], "last_physical_to_logical_map": np.array([[0, 1, 1], [1, 0, 1]])}
    assert from_sglang(dump).counts.tolist() == [[[2, 14]]]


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        ([], "a dump of the recorder is a dict"),
        ({"something": 1}, "has logical_count .* got 1 with"),
        ({"logical_count": np.zeros((2, 1, 4), np.int32)}, "counted no token"),
        ({"logical_count": np.ones((1, 4), np.int32)}, r"\[passes, layers, E\]"),
        ({"records": [], "last_physical_to_logical_map": np.array([[0]])}, "has no record"),
        ({"records": 7, "last_physical_to_logical_map": np.array([[0]])}, "records are a list of dicts; got a int"),
        ({"records": [7], "last_physical_to_logical_map": np.array([[0]])}, "a record is a dict .*; one is a int"),
        (
            {"records": [{"rank": 0}], "last_physical_to_logical_map": np.array([[0]])},
            "with an integer forward_pass_id; one is a dict of rank",
        ),
        (
            {"records": [{"forward_pass_id": 0}], "last_physical_to_logical_map": np.array([[0]])},
            r"global_physical_count is integers \[layers, P\]",
        ),
        ({"records": [], "last_physical_to_logical_map": np.array([[0, -1]])}, r"integers \[layers, P\] from 0 up"),
        (
            {"records": [sglang(0, 0, [[[5]]])], "last_physical_to_logical_map": np.array([[0, 1]])},
            "physical experts are 0..1",
        ),
    ],
)
def test_sglang_dumps_that_do_not_fit_are_refused(dump, message) -> None:
    with pytest.raises(ValueError, match=message):
        from_sglang(dump)


# --- files


def test_files_are_told_by_their_suffix(tmp_path) -> None:
    trace = RoutingTrace.from_expert_ids(IDS, 4)
    trace.save(tmp_path / "own.npz")
    np.savez(tmp_path / "vllm.npz", request_0=IDS[:2], request_1=IDS[2:])
    np.save(tmp_path / "vllm.npy", IDS)
    lines = [json.dumps(megatron(0, layer, IDS[::2, layer].tolist())) for layer in range(2)]
    (tmp_path / "router_trace_rank0.jsonl").write_text("\n".join(lines) + "\n\n")
    for name in ("own.npz", "vllm.npz", "vllm.npy"):
        assert same(read_trace(tmp_path / name, num_experts=4), trace)
    assert (
        read_trace(str(tmp_path / "router_trace_rank0.jsonl"), num_experts=4).expert_ids.tolist() == IDS[::2].tolist()
    )
    read = read_trace(tmp_path / "any.pt", read_torch=lambda path: {"logical_count": trace.counts})
    assert np.array_equal(read.counts, trace.counts)


@pytest.mark.parametrize("name", ["arr_{}", "request_{}_ids"])
def test_the_requests_of_one_file_come_in_the_order_of_their_numbers(name, tmp_path) -> None:
    requests = {name.format(i): np.full((1, 1, 1), i) for i in range(11)}
    np.savez(tmp_path / "vllm.npz", **dict(reversed(requests.items())))
    assert read_trace(tmp_path / "vllm.npz", num_experts=11).expert_ids.ravel().tolist() == list(range(11))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "traces are .npz, .npy, .jsonl or .pt"),
        ("a.pt", b"", "pass read_torch"),
        ("a.npy", b"nothing", "damaged or is no .npy"),
        ("a.npz", b"nothing", "is no .npz"),
        ("a.jsonl", b"{", "line 1: a router trace is JSON lines"),
        ("a.jsonl", b"\xff", "a.jsonl, line 1: a router trace is JSON lines"),
        ("a.jsonl", b"[]", "line 1: a router trace is one JSON object a line"),
    ],
)
def test_a_file_of_no_known_format_is_refused(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / name, num_experts=4)


def test_a_format_that_is_silent_on_experts_asks_for_them(tmp_path) -> None:
    np.save(tmp_path / "vllm.npy", IDS)
    with pytest.raises(ValueError, match=r"vLLM's routed_experts does not say .*--num-experts"):
        read_trace(tmp_path / "vllm.npy")
    RoutingTrace.from_expert_ids(IDS, 4).save(tmp_path / "own.npz")
    np.savez(tmp_path / "vllm.npz", IDS)
    with pytest.raises(ValueError, match=r"of one format: .*own\.npz is jaxmoe's own, and others are not"):
        read_trace([tmp_path / "vllm.npz", tmp_path / "own.npz"], num_experts=4)
    with pytest.raises(ValueError, match="same suffix"):
        read_trace([tmp_path / "a.npz", tmp_path / "b.npy"], num_experts=4)
