"""The projections around experts whose inputs are narrower than the model: y = W_out experts(W_in x)."""

from typing import Any, NamedTuple

import jax

from jaxmoe.config import MoEConfig
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros


class LatentProjection(NamedTuple):
    """The weights of the way into the experts' width X and back; all None where the experts work in the model's width.

    Also holds their parameters. The layer's parameters have these names.

    Attributes:
        w_latent_in: [X, D].
        w_latent_out: [D, X].
        b_latent_in: [X]; None without biases.
        b_latent_out: [D]; None without biases.
        latent_norm: [X]; None without a norm before the way back.
    """

    w_latent_in: Any = None
    w_latent_out: Any = None
    b_latent_in: Any = None
    b_latent_out: Any = None
    latent_norm: Any = None


def make_latent_projection(config: MoEConfig, *, param: ParamFactory) -> LatentProjection:
    """Make the parameters that the config asks for, each whole on every device."""
    if config.latent_size is None:
        return LatentProjection()
    X, D = config.latent_size, config.hidden_size
    w_in, w_out = param((X, D)), param((D, X))
    norm = None if config.latent_norm_eps is None else param((X,), init=ones)
    if not config.latent_bias:
        return LatentProjection(w_in, w_out, latent_norm=norm)
    return LatentProjection(w_in, w_out, param((X,), init=zeros), param((D,), init=zeros), norm)


def to_latent(x_TD: jax.Array, weights: LatentProjection) -> jax.Array:
    """W_in x + b_in, [T, X]; x where there is no projection."""
    return _project(x_TD, weights.w_latent_in, weights.b_latent_in)


def from_latent(y_TX: jax.Array, weights: LatentProjection, norm_eps: float | None) -> jax.Array:
    """W_out norm(y) + b_out, [T, D], without the norm where `norm_eps` is None; y where there is no projection."""
    if norm_eps is not None:
        y_TX = rms_norm(y_TX, weights.latent_norm, norm_eps)
    return _project(y_TX, weights.w_latent_out, weights.b_latent_out)


def _project(x_TX: jax.Array, weight: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    if weight is None:
        return x_TX
    y_TX = x_TX @ weight.T
    return y_TX if bias is None else y_TX + bias[None]
