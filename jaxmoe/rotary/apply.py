"""Rotary position embedding.

Letters here, beside the common ones of docs/concepts/letters.md: H heads, h dims of a head, r pairs of dims that
rotate.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxmoe.rotary.frequencies import RopeConfig


def apply_rope(x_BSHh: jax.Array, positions_BS: jax.Array, config: RopeConfig) -> jax.Array:
    """Rotate pairs of the leading dims of each head by position · frequency.

    Su et al. 2021 (arXiv:2104.09864), equation 34. Angles are float32; the rotation is in x's dtype. A sequence is as
    long as its last position here says. One that grows beyond `RopeConfig.long_above` keeps the keys in its cache as
    they were rotated.
    """
    frequencies, scale = jnp.asarray(config.frequencies, jnp.float32), jnp.float32(config.scale)
    if config.long is not None:
        is_long_B11 = jnp.max(positions_BS, axis=1)[:, None, None] >= config.long_above
        longer = jnp.asarray(config.long.frequencies, jnp.float32)
        frequencies = jnp.where(is_long_B11, longer[None, None], frequencies[None, None])
        scale = jnp.where(is_long_B11, config.long.scale, scale)
    frequencies = jax.lax.broadcast_to_rank(frequencies, 3)
    angles_BSr = positions_BS.astype(jnp.float32)[..., None] * frequencies
    cos = (jnp.cos(angles_BSr) * scale)[:, :, None].astype(x_BSHh.dtype)
    sin = (jnp.sin(angles_BSr) * scale)[:, :, None].astype(x_BSHh.dtype)
    r = angles_BSr.shape[-1]
    rotating, rest = x_BSHh[..., : 2 * r], x_BSHh[..., 2 * r :]
    if config.interleaved:
        first, second = rotating[..., 0::2], rotating[..., 1::2]
        rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return jnp.concatenate([rotated.reshape(rotating.shape), rest], axis=-1)
    first, second = rotating[..., :r], rotating[..., r:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def rotate_tail(x_BSHh: jax.Array, positions_BS: jax.Array, config: RopeConfig) -> jax.Array:
    """`apply_rope` to the trailing dims of each head instead of the leading ones."""
    first, last = jnp.split(x_BSHh, [x_BSHh.shape[-1] - config.rotary_dim], axis=-1)
    return jnp.concatenate([first, apply_rope(last, positions_BS, config)], axis=-1)


def turn_back_tail(x_BSHh: jax.Array, positions_BS: jax.Array, config: RopeConfig) -> jax.Array:
    """Undo the turn of `rotate_tail`: the same by the angles' opposites; a scale is applied once more, not undone."""
    backwards = tuple(-frequency for frequency in config.frequencies)
    return rotate_tail(x_BSHh, positions_BS, dataclasses.replace(config, frequencies=backwards))
