"""Matrix products over rows sorted by group: the arithmetic of a Mixture-of-Experts layer.

`api` checks the arguments; `backends` has the contract of a backend and the tables of them; `reference` is the oracle of
the tests; every other file is one backend or what backends share.
"""

from jaxmoe.kernels.grouped_matmul.api import expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.backends import BACKENDS, GPU_BACKENDS, Kernels, check_backend
from jaxmoe.kernels.grouped_matmul.choose import Choice, choose_backend
from jaxmoe.kernels.grouped_matmul.combine import combine_halves
from jaxmoe.kernels.grouped_matmul.quantized import QuantizedStack, dequantize
from jaxmoe.kernels.grouped_matmul.quantized_rows import ROW_FORMATS, QuantizedRows, quantize_rows
from jaxmoe.kernels.grouped_matmul.verdicts import hold_trials, known_verdicts
from jaxmoe.kernels.grouped_matmul.work import Work, local_stack
from jaxmoe.numerics import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "GPU_BACKENDS",
    "ROW_FORMATS",
    "Choice",
    "Kernels",
    "QuantizedRows",
    "QuantizedStack",
    "Work",
    "check_backend",
    "choose_backend",
    "combine_halves",
    "dequantize",
    "expert_mlp",
    "grouped_matmul",
    "hold_trials",
    "known_verdicts",
    "local_stack",
    "quantize_rows",
]
