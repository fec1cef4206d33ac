"""The load-balancing loss against the one that transformers trains Mixtral with."""

import numpy as np
import pytest

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="live parity needs torch and transformers: scripts/test --parity")
pytest.importorskip("transformers", reason="live parity needs torch and transformers: scripts/test --parity")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402

import jaxmoe  # noqa: E402
from jaxmoe.config import MoEConfig  # noqa: E402
from tests.support.meshes import mesh_of  # noqa: E402

B, S = 3, 7
CONFIG = MoEConfig(num_experts=8, num_experts_per_tok=3, hidden_size=16, moe_intermediate_size=8)


@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 2, 5]], ids=["whole", "padded"])
def test_one_layer_has_the_loss_of_transformers(lengths):
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(2, 2, 2), rngs=nnx.Rngs(0))
    x_BSD = np.random.default_rng(0).normal(size=(B, S, CONFIG.hidden_size)).astype(np.float32)
    mask_BS = np.arange(S) < np.array(lengths)[:, None]
    logits_TE = (x_BSD @ np.asarray(layer.w_router[...]).T).reshape(B * S, -1)
    expected = load_balancing_loss_func(
        (torch.tensor(logits_TE),),
        CONFIG.num_experts,
        CONFIG.num_experts_per_tok,
        None if mask_BS.all() else torch.tensor(mask_BS.astype(np.float32)),
    )
    _, stats = layer(jnp.asarray(x_BSD), jnp.asarray(mask_BS))
    np.testing.assert_allclose(float(stats.load_balancing_loss), float(expected), rtol=1e-5)
