"""Balance of the devices' loads, by the three published definitions.

Each takes loads [..., layers, devices]; leading dims are windows. A layer of a window in which
nothing was routed counts as level.
"""

import numpy as np


def max_over_mean(loads: np.ndarray) -> np.ndarray:
    """[..., layers], the busiest device's load as a multiple of the mean; 1 is level, n all on one device.

    Example:
        >>> max_over_mean(np.array([[3, 1], [2, 2]])).tolist()
        [1.5, 1.0]
    """
    mean, most = loads.mean(axis=-1), loads.max(axis=-1)
    return np.divide(most, mean, out=np.ones_like(mean, np.float64), where=mean > 0)


def vllm_balancedness(loads: np.ndarray) -> float:
    """Σ mean / Σ max over layers (and windows), from 1/n to 1: busy layers count for more.

    vLLM describes and first computed it so; later versions take mean and maximum over layers where
    they mean devices, and log another number.

    Example:
        >>> vllm_balancedness(np.array([[3, 1], [2, 2]]))
        0.8

    Source: vLLM, vllm/distributed/eplb/eplb_state.py (avg_tokens / max_tokens).
    """
    most = float(loads.max(axis=-1).sum())
    return float(loads.mean(axis=-1).sum()) / most if most else 1.0


def sglang_balancedness(loads: np.ndarray) -> float:
    """The mean over layers (and windows) of (mean + ε) / (max + ε) with ε = 1e-5, from 1/n to 1: layers count alike.

    Example:
        >>> round(sglang_balancedness(np.array([[3, 1], [2, 2]])), 4)
        0.8333

    Source: SGLang, compute_utilization_rate in python/sglang/srt/eplb/expert_distribution.py.
    """
    return float(((loads.mean(axis=-1) + 1e-5) / (loads.max(axis=-1) + 1e-5)).mean())


def tensorrt_llm_imbalance(loads: np.ndarray) -> float:
    """The mean over windows and layers of (max - mean) / mean, from 0 (level) to n - 1.

    Example:
        >>> tensorrt_llm_imbalance(np.array([[3, 1], [2, 2]]))
        0.25

    Source: TensorRT-LLM, examples/wide_ep/ep_load_balancer/report_load_statistics.py.
    """
    return float((max_over_mean(loads) - 1).mean())
