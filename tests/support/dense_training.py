"""The MoE layer as one dense product with every expert and a mask, for JAX to differentiate: the oracle of training."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx

import jaxmoe
from jaxmoe.models import Decoder


class DenseMoE(nnx.Module):
    """`jaxmoe.MoE` with a softmax router and gated SiLU experts, without mesh, placement, dispatch or grouped products.

    Takes over the parameters of a layer, by name; slots must be experts (linear placement, no padding).
    """

    def __init__(self, layer: jaxmoe.MoE):
        assert layer.placement.slot_to_expert.tolist() == list(range(layer.config.num_experts))
        self.config, self.mesh = layer.config, layer.mesh
        self.w_router, self.w_gate_up, self.w_down = layer.w_router, layer.w_gate_up, layer.w_down

    def __call__(self, x, token_mask=None, router_x=None, *, expert_ids=None, dispatch=None, adapter_ids=None):
        assert expert_ids is None
        assert adapter_ids is None
        config = self.config
        E, K = config.num_experts, config.num_experts_per_tok
        x_TD = x.reshape(-1, x.shape[-1])
        mask_T = jnp.ones(len(x_TD), bool) if token_mask is None else token_mask.reshape(-1)
        logits_TE = x_TD @ self.w_router[...].T
        p_TE = jax.nn.softmax(logits_TE)
        _, ids_TK = jax.lax.top_k(p_TE, K)
        chosen_TE = jnp.sum(jax.nn.one_hot(ids_TK, E), axis=1)
        weights_TE = p_TE * chosen_TE
        if config.router.choice.normalization is not None:
            weights_TE /= weights_TE.sum(axis=1, keepdims=True)
        chosen_TE, weights_TE = (a_TE * mask_T[:, None] for a_TE in (chosen_TE, weights_TE))
        gate_TEF, up_TEF = (jnp.einsum("td,efd->tef", x_TD, self.w_gate_up[...][:, half]) for half in range(2))
        out_TED = jnp.einsum("tef,edf->ted", jax.nn.silu(gate_TEF) * up_TEF, self.w_down[...])
        y = jnp.einsum("te,ted->td", weights_TE, out_TED).reshape(x.shape)

        T = mask_T.sum()
        mean_choices_E, mean_p_E = chosen_TE.sum(axis=0) / T, (p_TE * mask_T[:, None]).sum(axis=0) / T
        z_T = jnp.log(jnp.exp(logits_TE).sum(axis=1)) ** 2
        stats = SimpleNamespace(
            expert_counts=chosen_TE.sum(axis=0).astype(jnp.int32),
            load_balancing_loss=E * jnp.sum(jax.lax.stop_gradient(mean_choices_E) * mean_p_E),
            router_z_loss=(z_T * mask_T).sum() / T,
        )
        return y, stats


def make_dense(model: Decoder) -> Decoder:
    """Replace every MoE layer of a model by its oracle, in place."""
    for layer in model.layers:
        layer.moe = DenseMoE(layer.moe)
    return model
