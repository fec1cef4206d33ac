"""Counts of experts that fire together: within a layer for a token, and from one layer to the next."""

import numpy as np


def coactivation(ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Count how many tokens chose each pair of experts.

    Args:
        ids_TK: integers [T, K], the experts of each token in one layer, -1 for no choice.
        num_experts: E.

    Returns:
        int64 [E, E], symmetric; the diagonal is 0.

    Example:
        >>> coactivation(np.array([[0, 1], [0, 2]]), 3).tolist()
        [[0, 1, 1], [1, 0, 0], [1, 0, 0]]
    """
    counts_EE = transitions(ids_TK, ids_TK, num_experts)
    np.fill_diagonal(counts_EE, 0)
    return counts_EE


def transitions(before_TK: np.ndarray, after_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Count the tokens that chose expert e in one layer and expert f in the next.

    Args:
        before_TK: integers [T, K], the experts of each token in the first of the layers, -1 for no choice.
        after_TK: integers [T, K], those in the layer after it.
        num_experts: E.

    Returns:
        int64 [E, E], rows for the first layer.
    """
    E = num_experts
    # Row and column E take the -1s.
    before, after = np.where(before_TK < 0, E, before_TK), np.where(after_TK < 0, E, after_TK)
    pairs = before[:, :, None] * (E + 1) + after[:, None, :]
    return np.bincount(pairs.reshape(-1), minlength=(E + 1) ** 2).reshape(E + 1, E + 1)[:E, :E].copy()
