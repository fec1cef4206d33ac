"""A gated short convolution in attention's place, channels over tp and sequences over dp and ep.

Letters here, beside the common ones of docs/concepts/letters.md: A channels, W taps of the convolution, V = W - 1. On a
device A is its own.
"""

from typing import Any

import jax

from jaxmoe.config import ShortConvConfig
from jaxmoe.layers.cache import CacheArray
from jaxmoe.layers.conv import causal_conv
from jaxmoe.layers.param import ParamFactory, zeros
from jaxmoe.layers.recurrent import RecurrentCache, RecurrentMixer
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import TP


class ShortConv(RecurrentMixer):
    """y = out(c · conv(b · x)), with b, c and x projections of the activations.

    The operator of LFM2 (Liquid AI 2025, arXiv:2511.23404). It keeps the last inputs of its convolution and no state.
    """

    packable = ("w_in_b", "w_in_c", "w_in_x", "w_out")

    def __init__(self, config: ShortConvConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        del eps  # there is no norm in it
        self.config, self.mesh, self.linear = config, param.mesh, param.linear
        for part in "bcx":
            setattr(self, f"w_in_{part}", param((hidden_size, hidden_size), TP, None))
            if config.bias:
                setattr(self, f"b_in_{part}", param((hidden_size,), TP, init=zeros))
        self.conv = param((hidden_size, 1, config.conv_kernel_size), TP)
        self.w_out = param((hidden_size, hidden_size), None, TP)
        if config.bias:
            self.b_conv = param((hidden_size,), TP, init=zeros)
            self.b_out = param((hidden_size,), init=zeros)
        self.hidden_size, self.specs = hidden_size, WeightSpecs.of(self)

    def cache_arrays(self, batch_size: int, max_length: int) -> RecurrentCache:
        """The layer's cache, as a `RecurrentCache` of a `CacheArray`; `max_length` makes no difference."""
        del max_length
        kept = (batch_size, self.config.conv_kernel_size - 1, self.hidden_size)
        return RecurrentCache(conv=CacheArray(kept, (None, TP), by_position=False), state=None)

    def _run(
        self, w: dict[str, Any], x_BSD: jax.Array, lengths_B: jax.Array, before: RecurrentCache | None
    ) -> tuple[jax.Array, RecurrentCache]:
        """See `RecurrentMixer`."""
        b_BSA, c_BSA, x_BSA = (self._project(w, x_BSD, part) for part in "bcx")
        taps_AW, conv = w["conv"][:, 0], before.conv if before else None
        y_BSA, kept = causal_conv(b_BSA * x_BSA, taps_AW, w.get("b_conv"), conv, lengths_B)
        return c_BSA * y_BSA, RecurrentCache(kept, None)

    def _project(self, w: dict[str, Any], x_BSD: jax.Array, part: str) -> jax.Array:
        y_BSA = self.linear(x_BSD, w[f"w_in_{part}"])
        return y_BSA + w[f"b_in_{part}"][None, None] if self.config.bias else y_BSA
