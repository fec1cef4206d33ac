"""The dense oracle of the MoE layer: every expert in turn, in NumPy and float64."""

import numpy as np


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def dense_moe(
    x_TD: np.ndarray,
    ids_TK: np.ndarray,
    weights_TK: np.ndarray,
    w_gate_up_E2FD: np.ndarray,
    w_down_EDF: np.ndarray,
) -> np.ndarray:
    """Σ_k weight_k · expert_{id_k}(x) by a loop over experts; ids of -1 go nowhere."""
    x_TD, weights_TK = x_TD.astype(np.float64), weights_TK.astype(np.float64)
    y_TD = np.zeros_like(x_TD)
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(w_gate_up_E2FD, w_down_EDF, strict=True)):
        gate_FD, up_FD = gate_up_2FD.astype(np.float64)
        out_TD = (silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)) @ down_DF.astype(np.float64).T
        weight_T = np.where(ids_TK == expert, weights_TK, 0).sum(axis=1)
        y_TD += weight_T[:, None] * out_TD
    return y_TD


def softmax_top_k(x_TD: np.ndarray, w_router_ED: np.ndarray, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Mixtral's router, written out; the lowest index wins a tie."""
    logits_TE = x_TD.astype(np.float64) @ w_router_ED.astype(np.float64).T
    scores_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    scores_TE /= scores_TE.sum(axis=1, keepdims=True)
    ids_TK = np.argsort(-scores_TE, axis=1, kind="stable")[:, :K]
    weights_TK = np.take_along_axis(scores_TE, ids_TK, axis=1)
    return ids_TK, weights_TK / weights_TK.sum(axis=1, keepdims=True)
