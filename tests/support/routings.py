"""Routings to try: from a seed and a kind to the experts of each token."""

import numpy as np

from tests.support.dispatch_programs import E


def draw_ids(kind: str, seed: int, T: int, K: int, devices: int) -> np.ndarray:
    """int [T, K], distinct experts for each token (except "all_to_one"), -1 for a token without any."""
    rng = np.random.default_rng(seed)
    bias = np.zeros(E)
    if kind == "zipf":
        bias = -rng.uniform(0.5, 3) * np.log(rng.permutation(E) + 1)
    elif kind == "half_idle":
        bias = np.where(rng.permutation(E) < E // 2, -50.0, 0.0)
    elif kind == "hot_expert":
        bias[rng.integers(E)] = 50
    ids_TK = np.argsort(-(rng.gumbel(size=(T, E)) + bias), axis=1)[:, :K]
    if kind == "all_to_one":
        ids_TK = np.full((T, K), rng.integers(E))
    elif kind == "same_for_all":
        ids_TK[:] = ids_TK[0]
    elif kind == "masked_tokens":
        ids_TK[rng.random(T) < rng.random()] = -1
    elif kind == "idle_sources":
        # Whole devices without a token.
        idle = rng.random(devices) < 0.5
        ids_TK[np.repeat(idle, -(-T // devices))[:T]] = -1
    elif kind == "masked_choices":
        ids_TK[rng.random(ids_TK.shape) < rng.random()] = -1
    elif kind == "none":
        ids_TK[:] = -1
    return ids_TK


KINDS = [
    "uniform",
    "zipf",
    "half_idle",
    "hot_expert",
    "all_to_one",
    "same_for_all",
    "masked_tokens",
    "idle_sources",
    "masked_choices",
    "none",
]
