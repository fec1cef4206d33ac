"""vLLM's `routed_experts`: one array of expert ids per request."""

from collections.abc import Sequence

import numpy as np

from jaxmoe.placement.trace import RoutingTrace


def from_vllm(requests: np.ndarray | Sequence[np.ndarray], *, num_experts: int, window: int = 1024) -> RoutingTrace:
    """Join the arrays that vLLM returns with `enable_return_routed_experts`.

    Args:
        requests: integers [tokens, layers, K], one array a request (of `CompletionOutput.routed_experts`
            or `RequestOutput.prompt_routed_experts`). Tokens whose routing was not recorded, those that
            came from the prefix cache, are -1 throughout and are left out.
        num_experts: E.
        window: tokens per window of the trace.

    Raises:
        ValueError: there is no token, or the arrays disagree in layers or K.

    Example:
        >>> from_vllm([np.array([[[0, 1]], [[-1, -1]]])], num_experts=2).expert_ids.tolist()
        [[[0, 1]]]

    Source: vLLM, docs/training/routed_experts_replay.md (v0.21).
    """
    arrays = [np.asarray(array) for array in ([requests] if isinstance(requests, np.ndarray) else requests)]
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) != 1 or any(array.ndim != 3 for array in arrays):
        raise ValueError(
            f"routed_experts arrays are [tokens, layers, K] with the same layers and K; got shapes "
            f"{[array.shape for array in arrays[:4]]}"
        )
    ids = np.concatenate(arrays)
    ids = ids[(ids >= 0).any(axis=(1, 2))]
    if not ids.size:
        raise ValueError("no token of these routed_experts arrays has a recorded expert")
    return RoutingTrace.from_expert_ids(ids, num_experts, window=window)
