"""Made-up routing traces that look like real ones, for plots, tests and lessons.

Letters here, beside the common ones of docs/concepts/letters.md: W windows, Z topics.
"""

import numpy as np

from jaxmoe.placement.trace import RoutingTrace


def synthetic_trace(
    *,
    num_experts: int,
    experts_per_token: int,
    num_layers: int = 4,
    num_windows: int = 8,
    tokens_per_window: int = 512,
    num_topics: int = 8,
    popularity: float = 1.0,
    topicality: float = 2.0,
    drift: float = 0.5,
    seed: int = 0,
) -> RoutingTrace:
    """Sample a trace in which some experts are popular and a token's topic makes experts fire together.

    A token of topic z in layer l scores expert e with
    popularity·a[l, e] + topicality·b[l, z, e] + Gumbel noise, and takes the K best: sampling
    without replacement from a softmax. Topics come in runs (documents), keep their experts from
    layer to layer, and their mix changes over the windows, so a placement made on the first
    half meets a somewhat different second half.

    Args:
        num_experts: E.
        experts_per_token: K.
        num_layers: L.
        num_windows: W.
        tokens_per_window: tokens of each window.
        num_topics: kinds of text, each with experts of its own.
        popularity: spread of the experts' general popularity; 0 for none.
        topicality: strength with which a topic prefers its experts; 0 for no co-activation.
        drift: spread of the topics' shares between windows; 0 for a stationary mix.
        seed: seed of the random numbers; equal seeds give equal traces.

    Returns:
        A trace with token-level ids.

    Example:
        >>> synthetic_trace(num_experts=16, experts_per_token=2).expert_ids.shape
        (4096, 4, 2)
    """
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"a token chooses 1 to num_experts={num_experts} experts; got {experts_per_token}")
    rng = np.random.default_rng(seed)
    E, L, T = num_experts, num_layers, num_windows * tokens_per_window
    popular_LE = popularity * rng.standard_normal((L, E))
    preferred_LZE = topicality * rng.standard_normal((L, num_topics, E))
    topic_T = _topics(rng, num_topics, num_windows, tokens_per_window, drift)
    ids = np.empty((T, L, experts_per_token), np.int32)
    for layer in range(L):
        scores_TE = popular_LE[layer] + preferred_LZE[layer, topic_T] + rng.gumbel(size=(T, E))
        ids[:, layer] = np.argsort(-scores_TE, axis=1)[:, :experts_per_token]
    return RoutingTrace.from_expert_ids(ids, E, window=tokens_per_window)


def _topics(rng: np.random.Generator, num_topics: int, num_windows: int, window: int, drift: float) -> np.ndarray:
    """int64 [T], the topic of each token: runs of 32, in shares that take a random walk over the windows."""
    steps_WZ = rng.standard_normal((num_windows, num_topics)) * drift
    walk_WZ = np.cumsum(steps_WZ, axis=0)
    shares_WZ = np.exp(walk_WZ - walk_WZ.max(axis=1, keepdims=True))
    shares_WZ /= shares_WZ.sum(axis=1, keepdims=True)
    runs = -(-window // 32)
    return np.concatenate(
        [np.repeat(rng.choice(num_topics, size=runs, p=shares_Z), 32)[:window] for shares_Z in shares_WZ]
    )
