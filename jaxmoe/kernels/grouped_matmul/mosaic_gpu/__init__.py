"""The backend for Hopper and Blackwell GPUs of data centers: tensor cores through Pallas Mosaic GPU.

Gate, up, their biases and the activation are one kernel, the second product with its bias another. Matrices stay
(out, in) and rows where they are: nothing is copied, transposed or padded first. `tiles` has the two regimes, for many and
for few rows a group, and `choice` what is taken of them; `packed` what is done with 8-bit and 4-bit matrices, on Hopper
only, and `sums` how their products are scaled; `kernel` is Hopper's and `blackwell` Blackwell's, which the kind of device
chooses. `gradient_kernel` has the other products of a backward pass, on Hopper only.

Status: right in the interpreter, and built for H100 and B200 by ptxas with no register spilled at the tiles it chooses; it
has not run on a GPU, so nothing of it is timed, and "auto" does not choose it.
"""

from jaxmoe.kernels.grouped_matmul.mosaic_gpu.backend import expert_mlp, grouped_matmul, problem_of
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.choice import candidate_tiles, choose_tiles
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.gradient_products import missing_gradient
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import Problem, Tiles

__all__ = [
    "Problem",
    "Tiles",
    "candidate_tiles",
    "choose_tiles",
    "expert_mlp",
    "grouped_matmul",
    "missing_gradient",
    "problem_of",
]
