"""What a layer exchanges on 8 H100, read from the compiled program, against what its dispatch says from shapes."""

from collections import Counter

import jax
import pytest

import jaxmoe
from jaxmoe.dispatch import DISPATCHES, DispatchLayout, DispatchShape
from jaxmoe.models import get_family
from jaxmoe.planning import compile_steps, gpu_topology
from tests.support.published import QWEN3_30B, first_layers

BATCH, PROMPT = 8, 256
RAW = first_layers(QWEN3_30B, 1) | {"vocab_size": 1024}


@pytest.mark.parametrize(
    "dispatch",
    ["all_to_all", *(pytest.param(name, marks=pytest.mark.full) for name in DISPATCHES if name != "all_to_all")],
)
def test_a_layer_exchanges_what_its_dispatch_lists(dispatch, gpu_compiler) -> None:
    config = get_family("qwen3_moe").read_config(RAW)
    mesh = jaxmoe.make_mesh(tp=2, ep=4, devices=list(gpu_topology("h100", 8)))
    kernels = "mosaic_gpu" if jax.__version_info__ >= (0, 11, 2) else "auto"
    sizes = {"batch_size": BATCH, "prompt_length": PROMPT, "max_length": 2 * PROMPT}
    steps = compile_steps(config, mesh, kernels=kernels, dispatch=dispatch, **sizes)
    D, K = RAW["hidden_size"], RAW["num_experts_per_tok"]
    layout = DispatchLayout(
        mesh_shape=tuple(mesh.shape.items()), expert_axes=("ep",), partial_axes=("tp",), num_slots=RAW["num_experts"]
    )
    for name, tokens in (("prefill", BATCH * PROMPT), ("decode", BATCH)):
        shape = DispatchShape(tokens=tokens, choices=K, width=D, itemsize=2, layout=layout)
        found, others = Counter(), Counter()
        for each in steps[name].exchanges:
            # XLA gives ragged collectives no place in the program.
            own = "routed_experts" in each.origin or each.op == "ragged-all-to-all"
            (found if own else others)[each.op, frozenset(each.axes)] += each.nbytes
        listed = Counter()
        for each in DISPATCHES[dispatch].collectives(shape):
            if each.devices > 1:
                listed[each.op, frozenset(each.axes)] += each.bytes
        assert found == listed
        # Tokens come to the dispatch once, for the router and for the experts; a mask of a byte each comes with them.
        gathered = others["all-gather", frozenset({"ep"})]
        assert gathered in ((range(tokens * D * 2, tokens * (D * 2 + 1) + 1)) if dispatch == "replicated" else [0])
        # What else there is: sums of attention and embedding over tp, the sums of tokens and the logits gathered over it.
        assert set(others) <= {
            ("all-gather", frozenset({"ep"})),
            *((op, frozenset({"tp"})) for op in ("all-reduce", "all-gather")),
        }


@pytest.mark.full
def test_what_hides_an_exchange_is_told(gpu_compiler) -> None:
    """Of a layer without shared experts nothing large is there to hide the rows on their way: indices alone are."""
    config = get_family("qwen3_moe").read_config(RAW)
    mesh = jaxmoe.make_mesh(ep=8, devices=list(gpu_topology("h100", 8)))
    sizes = {"batch_size": BATCH, "prompt_length": 1024, "max_length": 2048}
    [prefill, _] = compile_steps(config, mesh, dispatch="all_to_all", kernels="auto", **sizes).values()
    rows = [each for each in prefill.exchanges if each.op == "all-to-all" and each.nbytes > 2**20 and not each.in_loop]
    assert len(rows) == 2
    assert all(each.asynchronous and each.hidden_by for each in rows)
    assert [each.in_loop for each in prefill.exchanges if each.op == "all-to-all"].count(True) == 3
