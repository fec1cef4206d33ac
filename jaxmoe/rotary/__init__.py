"""Rotary position embedding.

`frequencies` reads config.json's settings and needs NumPy only; `apply` rotates queries and keys by them, in JAX.
"""

from jaxmoe.rotary.frequencies import SCALINGS, RopeConfig, read_rope, rope_settings, yarn_mscale

__all__ = ["SCALINGS", "RopeConfig", "read_rope", "rope_settings", "yarn_mscale"]
