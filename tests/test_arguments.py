"""Arguments at the door: wrong kinds, shapes and ranges are refused by name, and NumPy's scalars are welcome."""

import re
from functools import cache, partial
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxmoe
from jaxmoe import SamplingParams
from jaxmoe.checks import flag, integer, one_of, real_number, token_ids
from jaxmoe.config import MLPConfig, MoEConfig, RouterConfig
from jaxmoe.config.routers import SCORES, Score
from tests.support.fake_model import FakeConfig, FakeModel
from tests.support.meshes import mesh_of

SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 8, "moe_intermediate_size": 8}
CONFIG = MoEConfig(**SIZES)
TOP_3 = SamplingParams(temperature=0.0, top_k=3)


def generate(**settings):
    model = FakeModel(mesh_of(1, 1, 1), config=FakeConfig(vocab_size=10, max_position_embeddings=200))
    return jaxmoe.generate(model, [[1, 2]], **settings)


def test_settings_without_effect_are_told():
    with pytest.warns(
        UserWarning, match="without effect: top_k, min_p; .* at temperature 0, and sampling wants"
    ) as told:
        generate(top_k=3, min_p=0.1, max_new_tokens=1)
    assert told[0].filename == __file__
    for settings in ({"top_k": 1}, {"top_p": 0.9, "temperature": 0.0}, {"top_p": 0.9, "temperature": 1.0, "seed": 0}):
        generate(**settings, max_new_tokens=1)  # and a warning is an error in the tests


@given(st.integers(-(2**31), 2**31 - 1))
def test_every_spelling_of_an_integer(value):
    for kind in (int, np.int32, np.int64, np.array):
        result = integer("n", kind(value))
        assert type(result) is int
        assert result == value
    for wrong in (float(value), str(value), None, True, [value], np.bool_(True)):
        with pytest.raises(ValueError, match=r"^n is an integer; got"):
            integer("n", wrong)
    with pytest.raises(ValueError, match=rf"n is an integer of at least {value + 1}; got {value}"):
        integer("n", value, least=value + 1)


@given(st.floats(allow_nan=True, allow_infinity=True, width=32))
def test_every_spelling_of_a_number(value):
    for kind in (float, np.float32, np.float64):
        if np.isfinite(value):
            result = real_number("x", kind(value))
            assert type(result) is float
            assert result == value
        else:
            with pytest.raises(ValueError, match=r"^x is a finite number; got"):
                real_number("x", kind(value))
    for wrong in (str(value), None, True, [value]):
        with pytest.raises(ValueError, match=r"^x is a finite number"):
            real_number("x", wrong)


def test_flags_names_and_token_ids():
    assert flag("f", np.bool_(True)) is True
    for wrong in (1, "true", None):
        with pytest.raises(ValueError, match="f is True or False"):
            flag("f", wrong)
    with pytest.raises(ValueError, match="name is one of a, b; got 'c'"):
        one_of("name", "c", ("a", "b"))
    with pytest.raises(ValueError, match=r"name is one of a, b; got \['a'\]"):
        one_of("name", ["a"], ("a", "b"))
    for several in ([1, 2], (1, 2), np.array([1, 2]), {1, 2}, [np.int64(1), 2], iter([1, 2])):
        assert token_ids("ids", several, 5) == {1, 2}
    assert token_ids("ids", np.int32(3), 5) == token_ids("ids", np.array(3), 5) == {3}


def test_the_names_of_configs_are_those_of_the_tables():
    assert set(get_args(Score)) == set(SCORES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(RouterConfig, score="softmaxx"), "TopK.score is one of softmax, sigmoid, sqrt_softplus"),
        (partial(RouterConfig, group_score="sum"), "GroupedTopK.group_score is one of max, top2_sum; got 'sum'"),
        (partial(RouterConfig, renormalize="no"), "RouterConfig.renormalize is True or False"),
        (partial(RouterConfig, scale=None), "TopK.scale is a finite number"),
        (partial(RouterConfig, scale=float("nan")), "TopK.scale is a finite number"),
        (partial(RouterConfig, input_norm_eps=0.0), "RouterConfig.input_norm_eps is a finite number above 0"),
        (partial(RouterConfig, p_norm=0), "PNormNormalization.p is a finite number above 0"),
        (partial(RouterConfig, num_groups=2.0), "GroupedTopK.num_groups is an integer"),
        (partial(RouterConfig, function="top"), "ChosenByFunction.function is a function"),
        (partial(MoEConfig, **SIZES | {"num_experts": "4"}), "MoEConfig.num_experts is an integer"),
        (partial(MoEConfig, **SIZES, bias=1), "MoEConfig.bias is True or False"),
        (
            partial(MoEConfig, **SIZES, shared=MLPConfig(hidden_size=9, intermediate_size=8)),
            "hidden_size=8, and that of shared is 9",
        ),
        (partial(jaxmoe.make_mesh, ep=2.0), "ep is an integer of at least 1; got 2.0"),
        (partial(jaxmoe.make_mesh, tp=True), "tp is an integer of at least 1; got True"),
        (partial(jaxmoe.simulate_devices, 0), "count is an integer of at least 1; got 0"),
        (partial(jaxmoe.ExpertPlacement.linear, 4, 0), "ep is an integer of at least 1; got 0"),
        (partial(jaxmoe.ExpertPlacement.linear, 4, 2, num_slots=8.0), "num_slots is an integer; got 8.0"),
        (partial(jaxmoe.ExpertPlacement.round_robin, 4, "2"), "ep is an integer of at least 1; got '2'"),
        (
            partial(jaxmoe.ExpertPlacement.from_counts, np.ones(4), ep=2.5),
            "ep is an integer of at least 1; got 2.5",
        ),
        (partial(jaxmoe.ExpertPlacement, 2.0, 1, [0, 1]), "num_experts is an integer of at least 1; got 2.0"),
        (partial(jaxmoe.Balancer, window=0), "Balancer.window is an integer of at least 1; got 0"),
        (partial(jaxmoe.Balancer, threshold=0.5), "Balancer.threshold is a finite number of at least 1, max / mean"),
        (partial(SamplingParams, temperature="hot"), "temperature is a finite number; got 'hot'"),
        (partial(SamplingParams, top_k=1.5), "top_k is an integer; got 1.5"),
        (partial(SamplingParams, top_p=float("nan")), "top_p is a finite number; got nan"),
        (partial(generate, max_new_tokens=1.5), "max_new_tokens is an integer of at least 1; got 1.5"),
        (partial(generate, eos_token_id="</s>"), "eos_token_id is an integer from 0 to 9; got '</s>'"),
        (partial(generate, eos_token_id=["1"]), "eos_token_id is an integer from 0 to 9; got '1'"),
        (partial(generate, eos_token_id=-1), "eos_token_id is an integer from 0 to 9; got -1"),
        (partial(generate, eos_token_id=[1, 10]), "eos_token_id is an integer from 0 to 9; got 10"),
        (partial(generate, sampling_params=TOP_3, top_k=4), "top_k is 4 and sampling_params.top_k is 3; give one"),
        (
            partial(generate, sampling_params=TOP_3, temperature=0.5),
            "temperature is 0.5 and sampling_params.temperature",
        ),
        (partial(generate, ignore_eos="yes"), "ignore_eos is True or False; got 'yes'"),
        (partial(generate, seed=1.5), "seed is an integer from 0"),
        (partial(generate, seed=[1, 2]), "got 2 seeds for 1 prompts"),
        (partial(jaxmoe.plan, "demo", ep=2.0), "ep is an integer of at least 1; got 2.0"),
        (partial(jaxmoe.plan, "demo", batch_size="1"), "batch_size is an integer of at least 1; got '1'"),
    ],
)
def test_values_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(jaxmoe.generate, "demo", [[1]]), "model is a model from jaxmoe.load; got str"),
        (partial(generate, stream=3), "stream is a function that is called with each TokenEvent; got int"),
        (partial(generate, stats={}), "stats is a jaxmoe.GenerationStats; got dict"),
        (partial(generate, sampling_params={"top_k": 3}), "sampling_params is a jaxmoe.SamplingParams; got dict"),
        (partial(generate, balancer="eplb"), "balancer is a jaxmoe.Balancer; got str"),
        (partial(jaxmoe.load, None, mesh=None), "path is a path, a text or a pathlib.Path; got NoneType"),
        (partial(jaxmoe.load, "demo", mesh="ep=2"), "mesh is a mesh, from jaxmoe.make_mesh; got str"),
        (
            lambda: jaxmoe.load("demo", mesh=mesh_of(1, 1, 8), placement=np.arange(16)),
            "placement is a strategy's name, a jaxmoe.ExpertPlacement, or a list of one for each MoE layer; got ndarray",
        ),
        (partial(jaxmoe.save, "demo", "out"), "model is a model from jaxmoe.load; got str"),
        (partial(jaxmoe.convert, 3, "out"), "source is a path, a text or a pathlib.Path; got int"),
        (partial(jaxmoe.plan, None), "path is a path, a text or a pathlib.Path; got NoneType"),
        (partial(jaxmoe.move, "demo", mesh=None), "model is a model from jaxmoe.load; got str"),
        (
            partial(jaxmoe.rebalance, "demo", "eplb"),
            "model is a model from jaxmoe.load, or an nnx module with jaxmoe.MoE",
        ),
        (partial(jaxmoe.MoE, SIZES, mesh=None), "config is a jaxmoe.MoEConfig; got dict"),
        (partial(jaxmoe.MoE, CONFIG, mesh="ep=2"), "mesh is a mesh, from jaxmoe.make_mesh or of your own; got str"),
        (partial(MoEConfig, **SIZES, router="softmax"), "MoEConfig.router is a RouterConfig; got str"),
    ],
)
def test_kinds_are_refused_by_name(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


@cache
def layer():
    return jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 1, 2), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones((2, 3, 7)),), "the last dim of x is hidden_size=8; got shape (2, 3, 7)"),
        ((jnp.float32(1),), "the last dim of x is hidden_size=8; got shape ()"),
        ((jnp.ones((3, 8), jnp.bfloat16),), "x has the dtype of the layer, float32; got bfloat16"),
        ((jnp.ones((3, 8), jnp.int32),), "x has the dtype of the layer, float32; got int32"),
        ((jnp.ones((2, 3, 8)), jnp.ones((3, 2), bool)), "token_mask is bool [2, 3], one for each token of x"),
        ((jnp.ones((2, 3, 8)), jnp.ones(6, bool)), "got bool [6]"),
        ((jnp.ones((2, 3, 8)), jnp.ones((2, 3))), "got float32 [2, 3]"),
        ((jnp.ones((2, 3, 8)), None, jnp.ones((6, 8))), "router_x has the shape of x, [2, 3, 8]"),
    ],
)
def test_a_layer_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layer()(*arguments)


def test_a_layer_without_weights_or_with_an_odd_dtype():
    with pytest.raises(RuntimeError, match=r"this MoE has no weights: .* make it with rngs=nnx.Rngs"):
        jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 1, 2))(jnp.ones((3, 8)))
    with pytest.raises(ValueError, match=r"dtype is float32, bfloat16, float16 or float64; got 'int8'"):
        jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 1, 2), dtype="int8")
    with pytest.raises(ValueError, match=r"dtype float64 needs 64-bit numbers: jax.config.update"):
        jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 1, 2), dtype="float64")


def test_numpy_scalars_are_welcome():
    config = MoEConfig(**{name: np.int64(size) for name, size in SIZES.items()}, bias=np.bool_(False))
    assert config == CONFIG
    assert hash(config) == hash(CONFIG)
    assert type(config.num_experts) is int
    router = RouterConfig(scale=np.float32(2), p_norm=np.float64(2), num_groups=np.int32(2), renormalize=np.bool_(True))
    assert router == RouterConfig(scale=2.0, p_norm=2.0, num_groups=2)
    placement = jaxmoe.ExpertPlacement.linear(np.int32(4), np.int64(2), num_slots=np.int8(6))
    assert placement == jaxmoe.ExpertPlacement.linear(4, 2, num_slots=6)
    assert jaxmoe.ExpertPlacement.from_json(placement.to_json()) == placement
    counts = np.array([1, 6, 2])
    assert jaxmoe.ExpertPlacement.from_counts(counts, ep=np.int32(2), num_slots=np.int32(4)).to_json()
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.float16(0.5))
    assert params == SamplingParams(temperature=0.5, top_k=3, top_p=0.5)
    assert jaxmoe.Balancer(window=np.int64(2), threshold=np.float32(1.5)) == jaxmoe.Balancer(window=2, threshold=1.5)
    y, _ = layer()(np.ones((3, 8), np.float32), np.ones(3, bool))
    assert y.shape == (3, 8)
