"""Rotary position embedding."""

import jax
import jax.numpy as jnp

from jaxmoe.config import RopeConfig


def rope_angles(positions_BS: jax.Array, config: RopeConfig) -> jax.Array:
    """Angle of every pair of dims at every position: position · theta^(-2i/rotary_dim).

    Su et al. 2021 (arXiv:2104.09864), equation 15.

    Returns:
        float32 [B, S, rotary_dim / 2], in radians.
    """
    exponents = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim
    frequencies = 1.0 / (config.theta**exponents) / config.linear_factor
    return positions_BS.astype(jnp.float32)[..., None] * frequencies


def apply_rope(x_BSHh: jax.Array, angles_BSr: jax.Array) -> jax.Array:
    """Rotate the leading ``2 r`` dims of each head; dim i is paired with dim i + r (the "rotate half" pairing)."""
    r = angles_BSr.shape[-1]
    cos = jnp.cos(angles_BSr)[:, :, None].astype(x_BSHh.dtype)
    sin = jnp.sin(angles_BSr)[:, :, None].astype(x_BSHh.dtype)
    first, second, rest = x_BSHh[..., :r], x_BSHh[..., r : 2 * r], x_BSHh[..., 2 * r :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
