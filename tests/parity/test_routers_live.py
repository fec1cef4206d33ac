"""Routers of families that are not loaded whole, and those with parts of their own, against transformers' modules."""

import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import RouterConfig
from jaxmoe.layers import route
from jaxmoe.layers.router import RouterWeights

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="live parity needs torch and transformers: scripts/test --parity")
transformers = pytest.importorskip(
    "transformers", reason="live parity needs torch and transformers: scripts/test --parity"
)

E, K, D, T = 11, 3, 32, 40

# model_type -> (its router's class, arguments of the config, our config, names of its tensors)
ROUTERS: dict[str, tuple[str, dict[str, Any], RouterConfig, dict[str, str]]] = {
    "deepseek_v4": (
        "DeepseekV4TopKRouter",
        {"num_local_experts": E, "num_experts_per_tok": K, "routed_scaling_factor": 1.5},
        RouterConfig(score="sqrt_softplus", correction_bias=True, sum_epsilon=1e-20, scale=1.5),
        {"w_router": "weight", "correction_bias": "e_score_correction_bias"},
    ),
    "gemma4_text": (
        "Gemma4TextRouter",
        {"num_experts": E, "top_k_experts": K, "rms_norm_eps": 1e-3},
        RouterConfig(expert_scale=True, input_norm_eps=1e-3),
        {"w_router": "proj.weight", "expert_scale": "per_expert_scale", "router_norm": "scale"},
    ),
}


@pytest.mark.parametrize("model_type", ROUTERS)
def test_experts_and_weights(model_type):
    name, sizes, config, names = ROUTERS[model_type]
    theirs = transformers.AutoConfig.for_model(model_type, hidden_size=D, **sizes)
    folder = model_type.removesuffix("_text")
    module = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)(theirs)
    generator = torch.Generator().manual_seed(0)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for tensor in names.values():
            tensors[tensor].copy_(torch.randn(tensors[tensor].shape, generator=generator))
        x_TD = torch.randn((T, D), generator=generator)
        found = module(x_TD)
    ids, weights = sorted(found[1:], key=lambda tensor: tensor.is_floating_point())
    router = RouterWeights(**{ours: jnp.asarray(tensors[tensor].detach().numpy()) for ours, tensor in names.items()})
    ids_TK, weights_TK = route(jnp.asarray(x_TD.numpy()), router, K, config)
    # In the order of the experts: transformers leaves its own open.
    ours, reference = np.argsort(ids_TK, axis=1), np.argsort(ids.numpy(), axis=1)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(ids_TK), ours, 1), np.sort(ids.numpy(), axis=1))
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(weights_TK), ours, 1),
        np.take_along_axis(weights.numpy(), reference, 1),
        rtol=1e-4,
        atol=1e-6,
    )
