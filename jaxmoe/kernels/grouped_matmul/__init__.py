"""Matrix products over rows sorted by group: the arithmetic of a Mixture-of-Experts layer.

`api` checks the arguments and chooses a backend; `reference` is the oracle of the tests; every other file is one
backend or what backends share.
"""

from jaxmoe.kernels.grouped_matmul.activations import ACTIVATIONS, combine_halves
from jaxmoe.kernels.grouped_matmul.api import BACKENDS, check_backend, expert_mlp, grouped_matmul

__all__ = ["ACTIVATIONS", "BACKENDS", "check_backend", "combine_halves", "expert_mlp", "grouped_matmul"]
