"""Rotary position embedding.

`frequencies` reads config.json's settings, and `agreement` compares those in several places; both need NumPy only. `apply`
rotates queries and keys, in JAX.
"""

from jaxmoe.rotary.agreement import check_rope_agreement
from jaxmoe.rotary.frequencies import SCALINGS, RopeConfig, read_rope, rope_settings, yarn_mscale

__all__ = ["SCALINGS", "RopeConfig", "check_rope_agreement", "read_rope", "rope_settings", "yarn_mscale"]
