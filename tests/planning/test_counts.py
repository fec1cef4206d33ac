"""The model of time counts what compiled programs do on simulated devices: operations, bytes that are read, bytes sent."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxmoe.checkpoint.mapping import abstract_model
from jaxmoe.generation.programs import Programs, Shape
from jaxmoe.hardware import GPUS, Links
from jaxmoe.models import Decoder, get_family
from jaxmoe.planning import read_exchanges, step_time
from tests.support.meshes import mesh_of
from tests.support.published import QWEN3_30B

# Small experts: what is in loops is counted once, however often it is done.
SIZES = {"hidden_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "vocab_size": 512}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "num_hidden_layers": 1}
CONFIG = get_family("qwen3_moe").read_config(QWEN3_30B | SIZES)
BATCH, PROMPT, LENGTH = 4, 256, 512
FAST = Links(within=1e30, between=1e30, latency=0)
FREE = dataclasses.replace(GPUS["h100"], memory_bandwidth=1e30, flops=1e30, links=FAST)
# Devices on which one thing takes a second a piece and everything else nothing.
COUNTERS = {
    "flops": dataclasses.replace(FREE, flops=1),
    "bytes": dataclasses.replace(FREE, memory_bandwidth=1),
    "sent": dataclasses.replace(FREE, links=Links(within=1, between=1, latency=0)),
}
LAYOUTS = [
    ((1, 4, 1), ("ep",)),
    ((1, 2, 2), ("ep", "tp")),
    pytest.param((2, 1, 1), ("ep",), marks=pytest.mark.full),
    pytest.param((2, 1, 2), ("dp", "ep"), marks=pytest.mark.full),
]


def counted(shape, expert_axes):
    """{phase: what a device does in the compiled program, and bytes of its arguments}."""
    mesh = mesh_of(*shape)
    model, programs = Decoder(CONFIG, mesh=mesh, expert_axes=expert_axes), Programs(mesh)
    leaves, sizes = programs.bind(model), Shape(model.padded_batch(BATCH), PROMPT, LENGTH)
    programs.init_cache(leaves, sizes)
    programs.prefill(leaves, sizes, "nothing")
    programs.decode(leaves, sizes, "nothing")
    found = {}
    for (name, *_), compiled in programs.compiled.items():
        if name == "init_cache":
            continue
        exchanges = read_exchanges(compiled.as_text(), tuple(mesh.shape.items()))
        cost = compiled.cost_analysis()
        found[name] = {
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
            "sent": sum(each.wire_bytes for each in exchanges),
            "arguments": compiled.memory_analysis().argument_size_in_bytes,
        }
    return found


def modeled(shape, expert_axes, phase):
    sizes = dict(zip(("dp", "tp", "ep"), shape, strict=True))
    model = abstract_model(CONFIG, sizes=sizes, expert_axes=expert_axes, dtype=jnp.dtype("float32"))
    length = PROMPT if phase == "prefill" else LENGTH
    return {
        name: step_time(model, phase, batch_size=BATCH, length=length, gpu=counter)
        for name, counter in COUNTERS.items()
    }


@pytest.mark.parametrize(("shape", "expert_axes"), LAYOUTS)
def test_the_model_counts_what_the_programs_do(shape, expert_axes) -> None:
    embedding = CONFIG.vocab_size * CONFIG.hidden_size * 4 / shape[1]
    for phase, real in counted(shape, expert_axes).items():
        model = modeled(shape, expert_axes, phase)
        # Masks, norms and the router's choices are left out.
        assert 1 <= real["flops"] / model["flops"].seconds < 1.1
        # A mask of the rows that count goes with the tokens to the experts.
        assert 1 <= max(real["sent"], 1) / max(model["sent"].seconds, 1) < 1.1
        # XLA for CPU copies a part of the cache for its products, and takes several passes for a softmax.
        assert 1 <= real["bytes"] / model["bytes"].seconds < 6
        if phase == "decode":
            terms = model["bytes"].terms()
            held = terms["dense"] + terms["experts"] + terms["cache"]
            assert 1 <= held / (real["arguments"] - embedding) < 1.15  # and scores are written and read
