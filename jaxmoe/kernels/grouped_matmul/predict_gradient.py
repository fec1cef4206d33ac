"""The predicted time of the backward pass of experts by the Hopper kernels, by the model of `predict`.

It is five products and what XLA does in between: the first product again, in float32; two of rows by columns of matrices;
two of outer products, which the model takes for products of each group's outputs with its rows for inner numbers; and a pass
over memory for the activation and one for dy, which is rounded. Nothing of it has been measured.

Letters here, beside the common ones of docs/concepts/letters.md: N and K of a matrix [N, K].
"""

import dataclasses
import math
from collections.abc import Sequence

from jaxmoe.hardware import GPU
from jaxmoe.kernels.grouped_matmul.predict import LAUNCH_SECONDS, MEMORY_SHARE, Prediction, Product, TileSizes, predict

# Rows of a stage of outer products.
STAGE_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiles:
    """Tiles as `predict` looks at them: those of `mosaic_gpu.gradient_kernel` where matrices are no smaller."""

    m: int = 128
    n: int = 256
    k: int = 64
    stages: int = 4
    band: int = 8
    swapped: bool = False
    splits: int = 1
    cluster: int = 1


TILES: TileSizes = _Tiles()


def gradient_products(sizes: Sequence[int], D: int, F: int) -> dict[str, Product]:
    """The products of a backward pass of gated experts [2F, D] and [D, F] in bfloat16, by name.

    >>> products = gradient_products((60, 60), D=256, F=128)
    >>> {name: product.flops / 2**20 for name, product in products.items()}
    {'first product': 15.0, 'dh': 7.5, 'dx': 15.0, 'dW_up': 16.0, 'dW_down': 8.0}
    """
    rows = tuple(sizes)
    # Rows of a group are multiplied in whole stages, the first of which may begin with some of the group before.
    stages = [math.ceil((size + 4) / STAGE_ROWS) for size in rows if size]
    inner = math.ceil(sum(stages) / max(len(rows), 1)) * STAGE_ROWS

    def outer(N: int, K: int) -> Product:
        return Product(sizes=(N,) * len(rows), halves=1, N=K, K=inner)

    return {
        "first product": Product(sizes=rows, halves=1, N=2 * F, K=D, out_bytes=4),
        "dh": Product(sizes=rows, halves=1, N=F, K=D, out_bytes=4),
        "dx": Product(sizes=rows, halves=1, N=D, K=2 * F),
        "dW_up": outer(2 * F, D),
        "dW_down": outer(D, F),
    }


def predict_gradient(sizes: Sequence[int], D: int, F: int, gpu: GPU) -> tuple[float, dict[str, Prediction]]:
    """Seconds of a backward pass of such experts with so many rows each, and the parts of it that are products."""
    found = {name: predict(product, TILES, gpu) for name, product in gradient_products(sizes, D, F).items()}
    # Gate, up and dh are read, h and their gradients written; dy is read in float32 and written rounded.
    nbytes = sum(sizes) * (F * (2 * 4 + 4 + 2 + 2 * 2) + D * (4 + 2))
    between = 2 * LAUNCH_SECONDS + nbytes / (gpu.memory_bandwidth * MEMORY_SHARE)
    return between + sum(prediction.seconds for prediction in found.values()), found
