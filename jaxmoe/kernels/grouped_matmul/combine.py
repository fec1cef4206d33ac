"""The step between an expert's two products: from gate and up to h, by the names that checkpoints use."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxmoe.numerics import ACTIVATIONS, SITU_UP_LIMIT, Activation


def gelu_without_erf(x: jax.Array) -> jax.Array:
    """x Φ(x), within 1.5e-7 |x| in float32 (Abramowitz and Stegun, 1964, formula 7.1.26)."""
    z = jnp.abs(x) * 2**-0.5
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * jnp.exp(-z * z)  # Φ(-|x|)
    return x * jnp.where(x < 0, tail, 1 - tail)


# Activations inside of kernels: Pallas has no error function on GPUs, and Mosaic GPU no function with a gradient of its own,
# as `jax.nn.relu` is.
KERNEL_ACTIVATIONS = ACTIVATIONS | {
    "gelu": gelu_without_erf,
    "relu": lambda x: jnp.maximum(x, 0),
    "relu2": lambda x: jnp.square(jnp.maximum(x, 0)),
}


# Those with an exponential and nothing else that a GPU approximates. ex2.approx is off by 2 units of float32 at most and its
# argument is rounded, so e^x is off by some |x| 2^-23: by 10^-5 where e^x is neither 0 nor infinite, while half a unit of
# bfloat16 is 2·10^-3 and of float16 5·10^-4. An approximate tanh is off by 5·10^-4 itself.
OF_EXPONENTIALS = frozenset({"silu", "gelu", "clamped_swiglu", "limited_swiglu", "capped_swiglu"})


def clamped_swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """(u + 1) · g · sigmoid(1.702 g), with g the gate cut off above `limit` and u the other half within ±`limit`.

    The expert function of gpt-oss.
    """
    gate = jnp.minimum(gate, limit)
    up = jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def limited_swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """silu(g) · u, with g the gate cut off above `limit` and u the other half within ±`limit`: that of DeepSeek-V4."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def capped_swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """min(silu(g), limit) · u, with g the gate and u the other half within ±`limit`: that of Step-3.5's last layers."""
    return jnp.minimum(jax.nn.silu(gate), limit) * jnp.clip(up, -limit, limit)


def situ(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """β tanh(g / β) · sigmoid(g) · λ tanh(u / λ), with β the `limit` and λ = 25: that of Kimi K3."""
    bounded = limit * jnp.tanh(gate / limit) * jax.nn.sigmoid(gate)
    return bounded * (SITU_UP_LIMIT * jnp.tanh(up / SITU_UP_LIMIT))


# Functions of gate, up and a limit, where the two halves are not simply act(gate) · up.
CLAMPED: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "clamped_swiglu": clamped_swiglu,
    "limited_swiglu": limited_swiglu,
    "capped_swiglu": capped_swiglu,
    "situ": situ,
}


@dataclasses.dataclass(frozen=True)
class Combine:
    """From the product with gate and up (with up alone, where there is no gate) to h, which goes into the second product.

    Attributes:
        activation: name in `ACTIVATIONS` or `CLAMPED`, computed in the sums' dtype, before the product with up.
        limit: limit of a clamped activation.
        gated: flag that there is a gate.
    """

    activation: str
    limit: float | None
    gated: bool

    def __call__(self, both: jax.Array) -> jax.Array:
        """From [..., gate | up], or [..., up], to [..., F]."""
        return self.halves(*jnp.split(both, 2, axis=-1)) if self.gated else self.halves(both)

    def halves(self, *halves: jax.Array, activations: Mapping[str, Activation] = ACTIVATIONS) -> jax.Array:
        """The same from gate and up (or up alone) as arrays of their own.

        Args:
            halves: gate and up, or up alone, each [..., F].
            activations: functions that the names stand for, `KERNEL_ACTIVATIONS` inside of a GPU kernel.
        """
        if self.activation in CLAMPED:
            assert self.limit is not None
            gate, up = halves
            return CLAMPED[self.activation](gate, up, self.limit)
        activated = activations[self.activation](halves[0])
        return activated * halves[1] if self.gated else activated


def combine_halves(activation: str, limit: float | None, *, gated: bool) -> Combine:
    """The function of [..., gate | up] (or of [..., up]) to [..., F] that an expert applies, in float32.

    Raises:
        ValueError: no such activation, or one that needs a limit and a gate has not got them.
    """
    if activation in CLAMPED:
        if limit is None or not gated:
            raise ValueError(f"activation {activation!r} needs a gate and a limit; got gated={gated}, limit={limit}")
    elif activation not in ACTIVATIONS:
        known = sorted([*ACTIVATIONS, *CLAMPED])
        raise ValueError(f"activation must be one of {known}; got {activation!r}. Add it to ACTIVATIONS.")
    return Combine(activation, limit, gated)
