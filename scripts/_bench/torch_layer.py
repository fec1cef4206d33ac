"""The sparse block of transformers' Qwen3-MoE with an `MoE` layer's weights; needs torch and transformers."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from jaxmoe.layers import MoE


def prepare(layer: MoE, inputs: Sequence[np.ndarray], dtype: str, platform: str) -> Callable[[], torch.Tensor]:
    """A turn: the block applied to each of the inputs [T, D], with its experts in torch's grouped_mm.

    Raises:
        NotImplementedError: jax runs on a GPU, and torch is not built for one.
    """
    if platform == "gpu" and not torch.cuda.is_available():
        raise NotImplementedError(f"torch {torch.__version__} sees no GPU")
    device = "cuda" if platform == "gpu" else "cpu"
    sizes = layer.config
    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden_size,
        moe_intermediate_size=sizes.moe_intermediate_size,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.num_experts_per_tok,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        block = Qwen3MoeSparseMoeBlock(config).to(getattr(torch, dtype)).eval()

    def put(parameter: torch.Tensor, values: np.ndarray) -> None:
        parameter.data.copy_(torch.from_numpy(values.astype(np.float32)).reshape(parameter.shape))

    slots = [int(np.flatnonzero(layer.placement.slot_to_expert == expert)[0]) for expert in range(sizes.num_experts)]
    put(block.gate.weight, np.asarray(layer.w_router[...]))
    put(block.experts.gate_up_proj, np.asarray(layer.w_gate_up[...])[slots])
    put(block.experts.down_proj, np.asarray(layer.w_down[...])[slots])
    tokens = [torch.from_numpy(x_TD).to(device, getattr(torch, dtype))[None] for x_TD in inputs]

    @torch.inference_mode()
    def turn() -> torch.Tensor:
        outs = [block(x_1TD)[0] for x_1TD in tokens]
        if device == "cuda":
            torch.cuda.synchronize()
        return outs[0]

    return turn
