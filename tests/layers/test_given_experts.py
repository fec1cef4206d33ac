"""Choices of experts that a layer is given: the router weights them as its own, and gradients are a dense layer's."""

import dataclasses
from collections.abc import Hashable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.config import ChosenByFunction, MoEConfig, PNormNormalization, RouterConfig, SparseMixer
from jaxmoe.layers.router import RouterWeights, choose_experts
from jaxmoe.models import read_model_config
from tests.support.covering import covering
from tests.support.families import FAMILIES
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of

T, D, F = 21, 16, 8


def by_magnitude(logits_TE: jax.Array, k: int, expert_ids: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """A user's own router: the logits farthest from zero, weighted by them."""
    ids_TK = jax.lax.top_k(jnp.abs(logits_TE), k)[1] if expert_ids is None else expert_ids
    return ids_TK, jnp.tanh(jnp.take_along_axis(logits_TE, ids_TK, axis=-1))


def routed_layers() -> dict[str, MoEConfig]:
    """The different routers of all families, and a user's, in layers that are alike otherwise."""
    found: dict[tuple, tuple[str, MoEConfig]] = {}
    for family in FAMILIES:
        layers = read_model_config(GOLDENS / family / "original")[1].layers
        theirs = next(layer.feed_forward for layer in layers if isinstance(layer.feed_forward, MoEConfig))
        config = MoEConfig(
            num_experts=theirs.num_experts,
            num_experts_per_tok=theirs.num_experts_per_tok,
            hidden_size=D,
            moe_intermediate_size=F,
            router=theirs.router,
            weights_on_input=theirs.weights_on_input,
        )
        found.setdefault((theirs.router, theirs.weights_on_input), (family, config))
    own = dataclasses.replace(found[RouterConfig(), False][1], router=RouterConfig(function=by_magnitude))
    return {**dict(found.values()), "a user's own": own}


LAYERS = routed_layers()


def what_a_layer_adds(config: MoEConfig) -> dict[str, Hashable]:
    """What a layer's program does for a router beside weighting choices by their logits."""
    router = config.router
    return {
        "weights on the input": config.weights_on_input,
        "norm": router.input_norm_eps is not None,
        "logit bias": router.logit_bias,
        "correction bias": router.correction_bias,
        "expert scale": router.expert_scale,
        "choice": type(router.choice),
    }


# Routers in which each of these occurs. How they weight a choice, which is all that differs, is compared without a layer.
WHOLE = [[*LAYERS][i] for i in covering([what_a_layer_adds(config) for config in LAYERS.values()])]


def router_params(config: MoEConfig) -> dict[str, jax.Array]:
    rng = np.random.default_rng(2)
    return {
        "correction_bias": jnp.asarray(rng.normal(0, 0.3, config.num_experts), jnp.float32),
        "expert_scale": jnp.asarray(rng.uniform(-0.5, 2, config.num_experts), jnp.float32),
    }


def other_choices(config: MoEConfig, seed: int) -> np.ndarray:
    """Choices that no router made: int32 [T, K], different experts."""
    order_TE = np.random.default_rng(seed).permuted(np.tile(np.arange(config.num_experts), (T, 1)), axis=1)
    return order_TE[:, : config.num_experts_per_tok].astype(np.int32)


def dense_weights(z_E: jax.Array, ids_K: jax.Array, scale_E: jax.Array, router: RouterConfig) -> jax.Array:
    """One token's weights of given experts, by the formula of each router."""
    choice = router.choice
    if isinstance(choice, ChosenByFunction):
        return jnp.tanh(z_E[ids_K])
    if isinstance(choice, SparseMixer):
        taken_E, weights = jnp.zeros(z_E.shape, bool), []
        for id in ids_K:
            far_E = (z_E[id] - z_E) / jnp.maximum(jnp.abs(z_E), z_E[id]) > 2 * choice.jitter
            weights.append(1 / jnp.sum(jnp.where(far_E | taken_E, 0, jnp.exp(z_E - z_E[id]))))
            taken_E |= jnp.arange(len(z_E)) == id
        return jnp.stack(weights)
    score = {
        "softmax": lambda z: jnp.exp(z) / jnp.exp(z).sum(),
        "sigmoid": lambda z: 1 / (1 + jnp.exp(-z)),
        "sqrt_softplus": lambda z: jnp.log1p(jnp.exp(z)) ** 0.5,
    }[choice.score]
    w_K = score(z_E[ids_K]) if choice.score_after_top_k else score(z_E)[ids_K]
    division = choice.normalization
    if isinstance(division, PNormNormalization):
        w_K = w_K / (w_K**division.p).sum() ** (1 / division.p)
    elif division is not None:
        w_K = w_K / jnp.maximum(w_K.sum() + division.epsilon, division.min_sum)
    return w_K * choice.scale * (scale_E[ids_K] if router.expert_scale else 1)


def dense(config: MoEConfig, x_TD, ids_TK, weights: dict) -> jax.Array:
    """The layer with every expert applied to every token."""
    router, hidden_TD = config.router, x_TD
    if router.input_norm_eps is not None:
        rms_T1 = jnp.sqrt(jnp.mean(x_TD**2, axis=1, keepdims=True) + router.input_norm_eps)
        hidden_TD = x_TD / rms_T1 * weights["router_norm"] / np.sqrt(D)
    z_TE = hidden_TD @ weights["w_router"].T + weights.get("b_router", 0)
    scale_E = weights.get("expert_scale", jnp.ones(config.num_experts))
    w_TK = jax.vmap(lambda z_E, ids_K: dense_weights(z_E, ids_K, scale_E, router))(z_TE, ids_TK)
    one_hot_TKE = jax.nn.one_hot(ids_TK, config.num_experts)
    w_TE, chosen_TE = jnp.einsum("tk,tke->te", w_TK, one_hot_TKE), one_hot_TKE.sum(axis=1)
    rows_TED = x_TD[:, None] * (w_TE[..., None] if config.weights_on_input else 1)
    gate, up = jnp.einsum(
        "ted,ehfd->htef", jnp.broadcast_to(rows_TED, (T, config.num_experts, D)), weights["w_gate_up"]
    )
    out_TED = jnp.einsum("tef,edf->ted", jax.nn.silu(gate) * up, weights["w_down"])
    return jnp.einsum("te,ted->td", chosen_TE if config.weights_on_input else w_TE, out_TED)


@pytest.mark.full
@pytest.mark.parametrize("name", LAYERS)
def test_weights_of_a_given_choice_and_their_gradients_are_the_formulas(name) -> None:
    config = LAYERS[name]
    logits_TE = jnp.asarray(np.random.default_rng(1).normal(0, 2, (T, config.num_experts)), jnp.float32)
    ids_TK, scale_E = other_choices(config, seed=3), router_params(config)["expert_scale"]
    dw_TK = np.random.default_rng(2).normal(size=ids_TK.shape).astype(np.float32)

    def ours(logits_TE, scale_E):
        weights = RouterWeights(None, **{**router_params(config), "expert_scale": scale_E})
        return choose_experts(logits_TE, weights, config.num_experts_per_tok, config.router, ids_TK)[1]

    def formula(logits_TE, scale_E):
        weigh = partial(dense_weights, scale_E=scale_E, router=config.router)
        return jax.vmap(weigh)(logits_TE, ids_TK)

    @jax.jit
    def program(logits_TE, scale_E):
        results = []
        for function in (ours, formula):
            w_TK, pull = jax.vjp(function, logits_TE, scale_E)
            results.append((w_TK, *pull(dw_TK)))
        return results

    found, expected = program(logits_TE, scale_E)
    assert np.abs(expected[1]).max() > 0
    for actual, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, theirs, atol=1e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.full
@pytest.mark.parametrize("name", WHOLE)
def test_equals_its_own_choice_and_the_dense_layer(name) -> None:
    config = LAYERS[name]
    layer = jaxmoe.MoE(config, mesh=mesh_of(1, 2, 2), placement="round_robin", rngs=nnx.Rngs(0))
    for param, value in router_params(config).items():
        if hasattr(layer, param):
            getattr(layer, param).set_value(jax.device_put(value, getattr(layer, param)[...].sharding))
    rng = np.random.default_rng(1)
    x_TD, dy_TD = rng.normal(size=(2, T, D)).astype(np.float32)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def program(params, x_TD, ids_TK):
        def loss(params, x_TD):
            y_TD, stats = nnx.merge(graphdef, params, rest)(x_TD, expert_ids=ids_TK)
            return jnp.sum(y_TD * dy_TD), (y_TD, stats)

        layer = nnx.merge(graphdef, params, rest)
        own = layer(x_TD)
        again = layer(x_TD, expert_ids=own[1].expert_ids)
        return *jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_TD), own, again

    given_TK = other_choices(config, seed=3)
    (ours, dx), (y_TD, stats), own, again = program(params, x_TD, given_TK)
    for first, second in zip(jax.tree.leaves(own), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)  # ids and counts: to the last one

    np.testing.assert_array_equal(stats.expert_ids, given_TK)
    np.testing.assert_array_equal(stats.expert_counts, np.bincount(given_TK.ravel(), minlength=config.num_experts))
    slots = layer.placement.expert_to_slots[:, 0]

    def logical(state) -> dict[str, jax.Array]:
        stacks = ("w_gate_up", "w_down")
        return {path[0]: p[...][slots] if path[0] in stacks else p[...] for path, p in nnx.to_flat_state(state)}

    @jax.jit
    def oracle(x_TD, weights):
        y_TD, pull = jax.vjp(lambda x_TD, weights: dense(config, x_TD, given_TK, weights), x_TD, weights)
        return y_TD, *pull(dy_TD)

    with jax.default_matmul_precision("highest"):
        expected, dx_dense, dense_grads = oracle(x_TD, logical(params))
    np.testing.assert_allclose(y_TD, expected, atol=1e-5 * max(1, np.abs(expected).max()))
    found = {"x": dx, **logical(ours)}
    assert np.abs(found["w_router"]).max() > 0
    for path, theirs in {"x": dx_dense, **dense_grads}.items():
        np.testing.assert_allclose(found[path], theirs, atol=2e-5 * max(1, np.abs(theirs).max()), err_msg=path)


@pytest.mark.covering(most=5)
@pytest.mark.parametrize("name", LAYERS)
def test_a_router_weights_its_own_choice_as_when_it_chose(name) -> None:
    """Bit for bit, with ties as well, and for tokens without a given choice among others that have one."""
    config = LAYERS[name]
    weights = RouterWeights(jnp.zeros((config.num_experts, D)), **router_params(config))

    @jax.jit
    def program(logits_TE, mask_T, given_TK):
        own = choose_experts(logits_TE, weights, config.num_experts_per_tok, config.router)
        ids_TK = jnp.where(mask_T[:, None], own[0], -1)
        mixed = jnp.where(mask_T[:, None], given_TK, -1)
        return own, *(
            choose_experts(logits_TE, weights, config.num_experts_per_tok, config.router, ids)
            for ids in (ids_TK, mixed)
        )

    for seed in range(8):
        rng = np.random.default_rng(seed)
        normal, ties = rng.normal(0, 2, (T, config.num_experts)), rng.integers(-1, 2, (T, config.num_experts))
        mask_T = rng.random(T) < 0.5
        for logits in (normal, ties):
            given_TK = other_choices(config, seed)
            own, again, mixed = program(jnp.asarray(logits, jnp.float32), mask_T, given_TK)
            for first, second in zip(own, again, strict=True):
                np.testing.assert_array_equal(first, second)
            np.testing.assert_array_equal(mixed[0], np.where(mask_T[:, None], given_TK, own[0]))
            np.testing.assert_array_equal(np.asarray(mixed[1])[~mask_T], np.asarray(own[1])[~mask_T])


def test_experts_chosen_for_want_of_eligible_ones_weigh_nothing() -> None:
    router = RouterConfig(renormalize=False, num_groups=4, topk_groups=1, group_score="max", zero_other_groups=True)
    logits_TE = jnp.asarray(np.random.default_rng(0).normal(0, 2, (T, 12)), jnp.float32)
    weights = RouterWeights(jnp.zeros((12, D)))
    own = choose_experts(logits_TE, weights, 5, router)
    again = choose_experts(logits_TE, weights, 5, router, own[0])
    np.testing.assert_array_equal(own[1], again[1])
    assert (np.asarray(own[1]) > 0).sum(axis=1).tolist() == [3] * T


@pytest.mark.full
def test_masked_rows_and_every_dispatch() -> None:
    """With choices of -1 where a row is masked, as the statistics of a call have them."""
    config = MoEConfig(num_experts=11, num_experts_per_tok=3, hidden_size=D, moe_intermediate_size=F)
    layer = jaxmoe.MoE(config, mesh=mesh_of(2, 1, 2), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(5)
    x, mask = jnp.asarray(rng.normal(size=(7, 3, D)), jnp.float32), jnp.asarray(rng.random((7, 3)) < 0.6)
    given = np.where(np.asarray(mask)[..., None], other_choices(config, 1).reshape(7, 3, 3), -1)
    results = [layer(x, mask, expert_ids=given, dispatch=name) for name in ("replicated", "all_gather", "all_to_all")]
    weights = {name: getattr(layer, name)[...][:11] for name in ("w_router", "w_gate_up", "w_down")}
    expected = np.asarray(dense(config, x.reshape(-1, D), np.maximum(given, 0).reshape(-1, 3), weights))
    for y, stats in results:
        np.testing.assert_allclose(
            np.asarray(y).reshape(-1, D), np.where(np.asarray(mask).reshape(-1, 1), expected, 0), atol=1e-5
        )
        np.testing.assert_array_equal(stats.expert_ids, given.reshape(-1, 3))


def test_what_is_no_choice_is_refused() -> None:
    config = MoEConfig(num_experts=11, num_experts_per_tok=3, hidden_size=D, moe_intermediate_size=F)
    layer, x = jaxmoe.MoE(config, mesh=mesh_of(1, 1, 1), rngs=nnx.Rngs(0)), jnp.ones((2, D))
    for ids, message in (
        (np.zeros((2, 2), int), r"integers \[2, 3\], num_experts_per_tok=3 for each token; got int\d+ \[2, 2\]"),
        (np.zeros((3, 3), int), r"got int\d+ \[3, 3\]"),
        (np.ones((2, 3), np.float32), r"got float32 \[2, 3\]"),
        ([[0, 1, 2], [0, 1, 11]], r"is 3 different experts of 0\.\.10, or -1 in all places for none; got \[0, 1, 11\]"),
        ([[0, 1, -1], [0, 1, 2]], r"got \[0, 1, -1\]"),
        ([[0, 1, 2], [4, 5, 4]], r"got \[4, 5, 4\]"),
        ([[0, 1, -2], [4, 5, 4]], r"got \[0, 1, -2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, expert_ids=np.asarray(ids))
    y, _ = jax.jit(lambda ids: layer(x, expert_ids=ids))(np.array([[0, 1, 11], [0, 1, 2]]))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()
    deaf = dataclasses.replace(config, router=RouterConfig(function=lambda z, k: jax.lax.top_k(z, k)[::-1]))
    with pytest.raises(ValueError, match=r"takes them as expert_ids=, .* '<lambda>' has no such parameter"):
        jaxmoe.MoE(deaf, mesh=mesh_of(1, 1, 1), rngs=nnx.Rngs(0))(x, expert_ids=np.array([[0, 1, 2]] * 2))
