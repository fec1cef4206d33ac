"""Every family's router against its formula in NumPy."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import (
    ChosenByFunction,
    ExpertChoice,
    GroupedTopK,
    PNormNormalization,
    RouterConfig,
    SparseMixer,
    SumNormalization,
    TopK,
)
from jaxmoe.layers import route
from jaxmoe.layers.router import RouterWeights, router_logits

pytestmark = pytest.mark.covering

E, K, T, GROUPS = 12, 3, 50, 4


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def sqrt_softplus(logits: np.ndarray) -> np.ndarray:
    return np.sqrt(np.log1p(np.exp(logits)))


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, the lowest index first among equals."""
    return np.argsort(-values, kind="stable")[:count]


def in_best_groups(choice: np.ndarray, count: int, group_score: Callable[[np.ndarray], float]) -> np.ndarray:
    """`choice` where an expert's group is one of the `count` best, -inf elsewhere."""
    groups = choice.reshape(GROUPS, -1)
    masked = np.full_like(groups, -np.inf)
    for group in best(np.array([group_score(group) for group in groups]), count):
        masked[group] = groups[group]
    return masked.ravel()


def top2_sum(group: np.ndarray) -> float:
    return np.sort(group)[-2:].sum()


def sparsemixer(logits: np.ndarray, ids: np.ndarray, jitter: float) -> np.ndarray:
    """Weights of `ids`, chosen one after the other: a softmax over those left that come near the largest left."""
    left, weights = logits.copy(), []
    for id in ids:
        with np.errstate(divide="ignore", invalid="ignore"):  # a logit of 0 is near
            far = (left[id] - logits) / np.maximum(np.abs(logits), left[id]) > 2 * jitter
        weights.append(softmax(np.where(far, -np.inf, left))[id])
        left[id] = -np.inf
    return np.array(weights)


@dataclasses.dataclass(frozen=True)
class Row:
    """A router as its config, and as formulas over one token's logits z [E] and the correction bias b [E].

    `choose(z, b)` is what the K largest are chosen of; `weigh(z, ids)` the weights of the chosen.
    """

    config: RouterConfig
    choose: Callable[[np.ndarray, np.ndarray], np.ndarray]
    weigh: Callable[[np.ndarray, np.ndarray], np.ndarray]


def normalized(weights: np.ndarray, epsilon: float = 0.0) -> np.ndarray:
    return weights / (weights.sum() + epsilon)


def by_magnitude(logits_TE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """A user's own router: the logits farthest from zero, all with the same weight."""
    ids_TK = jax.lax.top_k(jnp.abs(logits_TE), k)[1]
    return ids_TK, jnp.full(ids_TK.shape, 1 / k)


@dataclasses.dataclass(frozen=True)
class ByRank(ExpertChoice):
    """A user's own policy: the largest logits, weighted by their places alone."""

    def choose(self, logits_TE, K, bias_E, scale_E):
        ids_TK = jax.lax.top_k(logits_TE, K)[1]
        return ids_TK, self.weigh(logits_TE, ids_TK, scale_E)

    def weigh(self, logits_TE, ids_TK, scale_E):
        return jnp.broadcast_to(1 / (1 + jnp.arange(ids_TK.shape[1], dtype=logits_TE.dtype)), ids_TK.shape)


ROWS = {
    "mixtral, qwen3_5, hunyuan_v1": Row(
        RouterConfig(),
        lambda z, b: softmax(z),
        lambda z, ids: normalized(softmax(z)[ids]),
    ),
    "qwen2, qwen3, olmoe, jamba": Row(
        RouterConfig(renormalize=False),
        lambda z, b: softmax(z),
        lambda z, ids: softmax(z)[ids],
    ),
    "dbrx": Row(
        RouterConfig(p_norm=1.0),
        lambda z, b: softmax(z),
        lambda z, ids: normalized(softmax(z)[ids]),
    ),
    "dbrx, p=2": Row(
        RouterConfig(p_norm=2.0),
        lambda z, b: softmax(z),
        lambda z, ids: softmax(z)[ids] / np.linalg.norm(softmax(z)[ids]),
    ),
    "gpt_oss, granitemoe": Row(
        RouterConfig(score_after_top_k=True, renormalize=False),
        lambda z, b: z,
        lambda z, ids: softmax(z[ids]),
    ),
    "llama4": Row(
        RouterConfig(score="sigmoid", score_after_top_k=True, renormalize=False),
        lambda z, b: z,
        lambda z, ids: sigmoid(z[ids]),
    ),
    "deepseek_v2": Row(
        RouterConfig(
            renormalize=False, num_groups=GROUPS, topk_groups=2, group_score="max", zero_other_groups=True, scale=16.0
        ),
        lambda z, b: in_best_groups(softmax(z), 2, np.max),
        lambda z, ids: softmax(z)[ids] * 16.0,
    ),
    "deepseek_v3": Row(
        RouterConfig(
            score="sigmoid", correction_bias=True, num_groups=GROUPS, topk_groups=2, sum_epsilon=1e-20, scale=2.5
        ),
        lambda z, b: in_best_groups(sigmoid(z) + b, 2, top2_sum),
        lambda z, ids: normalized(sigmoid(z)[ids], 1e-20) * 2.5,
    ),
    "deepseek_v3, one group": Row(
        RouterConfig(score="sigmoid", correction_bias=True, num_groups=GROUPS, topk_groups=1, renormalize=False),
        lambda z, b: in_best_groups(sigmoid(z) + b, 1, top2_sum),
        lambda z, ids: sigmoid(z)[ids],
    ),
    "glm4_moe, hy_v3": Row(
        RouterConfig(score="sigmoid", correction_bias=True, sum_epsilon=1e-20, scale=1.5),
        lambda z, b: sigmoid(z) + b,
        lambda z, ids: normalized(sigmoid(z)[ids], 1e-20) * 1.5,
    ),
    "minimax_m2": Row(
        RouterConfig(score="sigmoid", correction_bias=True),
        lambda z, b: sigmoid(z) + b,
        lambda z, ids: normalized(sigmoid(z)[ids]),
    ),
    "ernie4_5_moe": Row(
        RouterConfig(correction_bias=True, min_sum=1e-12),
        lambda z, b: softmax(z) + b,
        lambda z, ids: softmax(z)[ids] / max(softmax(z)[ids].sum(), 1e-12),
    ),
    "deepseek_v4": Row(
        RouterConfig(score="sqrt_softplus", correction_bias=True, sum_epsilon=1e-20, scale=1.5),
        lambda z, b: sqrt_softplus(z) + b,
        lambda z, ids: normalized(sqrt_softplus(z)[ids], 1e-20) * 1.5,
    ),
    "phimoe": Row(
        RouterConfig(sparsemixer=0.2, renormalize=False),
        lambda z, b: z,
        lambda z, ids: sparsemixer(z, ids, 0.2),
    ),
    "gemma4": Row(
        RouterConfig(expert_scale=True),
        lambda z, b: softmax(z),
        lambda z, ids: normalized(softmax(z)[ids]) * EXPERT_SCALES[ids],
    ),
    "a user's own": Row(
        RouterConfig(function=by_magnitude),
        lambda z, b: np.abs(z),
        lambda z, ids: np.full(len(ids), 1 / len(ids)),
    ),
    "a user's own policy": Row(
        RouterConfig(choice=ByRank()),
        lambda z, b: z,
        lambda z, ids: 1 / np.arange(1, len(ids) + 1),
    ),
}


EXPERT_SCALES = np.linspace(-0.5, 2.0, E, dtype=np.float32)


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(0, 2, (T, E)), rng.normal(0, 0.3, E)


def tied_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Few different logits and biases, so that most tokens have equal choices."""
    return rng.integers(-1, 2, (T, E)).astype(float), rng.choice([-0.3, 0.0], E)


def negative_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Every corrected score is below zero: a mask of zeros would choose what it masks."""
    return rng.normal(0, 2, (T, E)), rng.uniform(-7, -5, E)


def tiny_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The chosen scores are so small that what keeps their sum from zero decides."""
    logits = rng.normal(-55, 2, (T, E))
    logits[:, 0] = 0.0
    return logits, np.where(np.arange(E) == 0, -9.0, rng.normal(0, 0.3, E))


CASES = (random_case, tied_case, negative_case, tiny_case)


def run(config: RouterConfig, k: int, logits: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`route` with an identity for a projection, so that the logits are exactly those given."""
    weights = RouterWeights(
        jnp.eye(E), correction_bias=jnp.asarray(bias, jnp.float32), expert_scale=jnp.asarray(EXPERT_SCALES)
    )
    ids_TK, weights_TK = jax.jit(route, static_argnums=(2, 3))(jnp.asarray(logits, jnp.float32), weights, k, config)
    assert (ids_TK.dtype, weights_TK.dtype) == ("int32", "float32")
    return np.asarray(ids_TK), np.asarray(weights_TK)


@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_formula(row: Row, case, k: int):
    logits, bias = (array.astype(np.float32).astype(np.float64) for array in case(np.random.default_rng(0)))
    ids_TK, weights_TK = run(row.config, k, logits, bias)
    for ids, weights, token in zip(ids_TK, weights_TK, logits, strict=True):
        expected = best(row.choose(token, bias), k)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_allclose(weights, row.weigh(token, expected), rtol=3e-5)


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.config.choice.expert_groups == 1])
def test_all_experts(row: Row):
    logits, bias = random_case(np.random.default_rng(1))
    ids_TK, _ = run(row.config, E, logits, bias)
    np.testing.assert_array_equal(np.sort(ids_TK), np.broadcast_to(np.arange(E), (T, E)))


def test_equal_logits_choose_the_first_experts():
    ids_TK, weights_TK = run(RouterConfig(), K, np.zeros((2, E)), np.zeros(E))
    np.testing.assert_array_equal(ids_TK, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(weights_TK, 1 / K, rtol=1e-6)


def test_equal_groups_choose_the_first():
    config = RouterConfig(num_groups=GROUPS, topk_groups=2)
    ids_TK, _ = run(config, 6, np.zeros((1, E)), np.zeros(E))
    np.testing.assert_array_equal(ids_TK, [range(6)])


def test_experts_of_other_groups_weigh_nothing_where_they_score_zero():
    """DeepSeek-V2 with more experts for a token than its groups have: the rest are the first of the others."""
    config = RouterConfig(
        renormalize=False, num_groups=GROUPS, topk_groups=1, group_score="max", zero_other_groups=True, scale=2.0
    )
    logits = np.zeros((1, E))
    logits[0, 3:6] = 2.0, 1.0, 3.0
    ids_TK, weights_TK = run(config, 5, logits, np.zeros(E))
    np.testing.assert_array_equal(ids_TK, [[5, 3, 4, 0, 1]])
    np.testing.assert_allclose(weights_TK, [[*(2 * softmax(logits[0])[[5, 3, 4]]), 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_projection_and_its_bias_are_float32(dtype):
    rng = np.random.default_rng(2)
    x_TD, w_ED, b_E = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((T, 7), (E, 7), (E,)))
    config = RouterConfig(score_after_top_k=True, renormalize=False, logit_bias=True)
    ids_TK, weights_TK = route(x_TD, RouterWeights(w_ED, b_E), K, config)
    assert weights_TK.dtype == "float32"
    logits_TE = np.asarray(x_TD, np.float64) @ np.asarray(w_ED, np.float64).T + np.asarray(b_E, np.float64)
    for ids, weights, logits in zip(np.asarray(ids_TK), np.asarray(weights_TK), logits_TE, strict=True):
        np.testing.assert_array_equal(ids, best(logits, K))
        np.testing.assert_allclose(weights, softmax(logits[ids]), rtol=1e-5)


def test_the_input_is_normalized_for_the_router_alone():
    rng = np.random.default_rng(3)
    x_TD, w_ED, scale_D = rng.normal(size=(T, 7)), rng.normal(size=(E, 7)), rng.normal(size=7)
    weights = RouterWeights(jnp.asarray(w_ED, jnp.float32), router_norm=jnp.asarray(scale_D, jnp.float32))
    logits_TE = router_logits(jnp.asarray(x_TD, jnp.float32), weights, RouterConfig(input_norm_eps=0.5))
    normed_TD = x_TD / np.sqrt((x_TD**2).mean(axis=1, keepdims=True) + 0.5) * scale_D / np.sqrt(7)
    np.testing.assert_allclose(logits_TE, normed_TD @ w_ED.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda z, k: (jax.lax.top_k(z, k)[1][:, 0], z[:, 0]), "int32 .50,. and float32 .50,."),
        (lambda z, k: (z[:, :k], z[:, :k]), "float32 .50, 3. and float32 .50, 3."),
        (lambda z, k: (jax.lax.top_k(z, k)[1], jnp.ones((T, k), jnp.int32)), "int32 .50, 3. and int32 .50, 3."),
    ],
    ids=["shape", "ids", "weights"],
)
def test_a_function_that_gives_something_else_is_refused(function, found):
    with pytest.raises(ValueError, match=rf"of shape \[T, K\], here \(50, 3\); '<lambda>' gives {found}"):
        run(RouterConfig(function=function), K, np.zeros((T, E)), np.zeros(E))


@pytest.mark.parametrize(
    ("switches", "choice"),
    [
        ({}, TopK()),
        (
            {"score": "sigmoid", "score_after_top_k": True, "scale": 2},
            TopK(score="sigmoid", score_after_top_k=True, scale=2.0),
        ),
        ({"renormalize": False}, TopK(normalization=None)),
        ({"sum_epsilon": 1e-3, "min_sum": 0.1}, TopK(normalization=SumNormalization(epsilon=1e-3, min_sum=0.1))),
        ({"p_norm": 2, "renormalize": False}, TopK(normalization=PNormNormalization(p=2.0))),
        ({"p_norm": None, "function": None, "sparsemixer": None}, TopK()),
        ({"num_groups": 1, "group_score": "max", "zero_other_groups": True}, TopK()),
        (
            {"num_groups": 4, "topk_groups": 2, "group_score": "max", "zero_other_groups": True},
            GroupedTopK(num_groups=4, topk_groups=2, group_score="max", zero_other_groups=True),
        ),
        ({"sparsemixer": 0.1}, SparseMixer(jitter=0.1, normalization=SumNormalization())),
        ({"sparsemixer": 0.1, "renormalize": False, "scale": 2}, SparseMixer(jitter=0.1, scale=2.0)),
        ({"function": by_magnitude}, ChosenByFunction(function=by_magnitude)),
    ],
    ids=lambda value: "-".join(value) or "none" if isinstance(value, dict) else "",
)
def test_switches_are_a_policy_in_short(switches, choice):
    router = RouterConfig(**switches, logit_bias=True)
    assert router == RouterConfig(choice=choice, logit_bias=True)
    assert hash(router) == hash(RouterConfig(choice=choice, logit_bias=True))
    assert dataclasses.replace(router, logit_bias=False) == RouterConfig(choice=choice)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_groups": 2, "topk_groups": 3}, ValueError, "topk_groups=3 is above num_groups=2"),
        ({"topk_groups": 2}, ValueError, "topk_groups=2 is above num_groups=1"),
        (
            {"sparsemixer": 0.1, "num_groups": 2, "score": "sigmoid"},
            ValueError,
            "no part that num_groups and score could",
        ),
        (
            {"function": by_magnitude, "scale": 2.0},
            ValueError,
            r"RouterConfig\(function=\) has no part that scale could",
        ),
        ({"function": by_magnitude, "sparsemixer": 0.1}, ValueError, "no part that sparsemixer could"),
        (
            {"choice": TopK(), "scale": 2.0},
            ValueError,
            r"a choice, or the switches of one; got choice=TopK\(.* and scale",
        ),
        ({"choice": "softmax"}, TypeError, r"RouterConfig\.choice is an ExpertChoice, such as TopK\(\); got str"),
        ({"scales": 2.0}, TypeError, "RouterConfig has no argument scales"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_belong_together_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        RouterConfig(**arguments)
