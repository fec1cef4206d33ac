#!/usr/bin/env python3
"""How long should the experts of published models take on a GPU, by the model of the Hopper kernel, and what bounds them?

It prints a table of the predicted microseconds of both products of a layer's experts in bfloat16, with the tiles that the
kernel chooses and even routing, and beside them what sessions on such a GPU measured, where `results/` has any; a second one
of what clusters of two blocks gain; a third of what stands around the products in a layer; and a fourth of their backward
passes. The same tables stand in docs/reference/kernel_times.md, where --write puts them.

    python scripts/predict_kernels.py
    python scripts/predict_kernels.py --chip h20 --parts
    python scripts/predict_kernels.py --write
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxmoe.hardware import GPU, get_gpu
from jaxmoe.kernels.grouped_matmul.mosaic_gpu import Problem, candidate_tiles, choose_tiles
from jaxmoe.kernels.grouped_matmul.predict import Prediction, Product, likely_sizes, predict
from jaxmoe.kernels.grouped_matmul.predict_gradient import predict_gradient
from jaxmoe.kernels.grouped_matmul.predict_moves import gather_seconds, sum_seconds
from scripts._bench.cases import SHAPES, TOKENS, Case, Shape, floor_of
from scripts._session.records import RESULTS, read_results

PAGE = ROOT / "docs" / "reference" / "kernel_times.md"
BEGIN, END = "<!-- by scripts/predict_kernels.py -->\n", "<!-- end -->\n"
BEGIN_CLUSTERS = "<!-- clusters, by scripts/predict_kernels.py -->\n"
BEGIN_LAYERS = "<!-- layers, by scripts/predict_kernels.py -->\n"
BEGIN_GRADIENTS = "<!-- gradients, by scripts/predict_kernels.py -->\n"
# Tokens of a step of training, on the devices that share the experts.
TRAINED_TOKENS = (4096, 16384)
# (shape, tokens) -> seconds of both products, and the session that measured them.
Measured = dict[tuple[str, int], tuple[float, str]]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, predict, print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="h100", help="kind of GPU, a Hopper (default h100)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of sessions' folders")
    parser.add_argument("--parts", action="store_true", help="print the parts of each time, and the tiles, besides")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    gpu = get_gpu(args.chip)
    if gpu.compute_capability != (9, 0):
        parser.error(
            f"the model is one of the Hopper kernel; {gpu.name} has compute capability {gpu.compute_capability}"
        )
    tables = tables_of(gpu, args.results)
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        for begin, lines in tables.items():
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}{lines}{END}{rest.partition(END)[2]}"
        PAGE.write_text(text, encoding="utf-8")
        return
    print(*tables.values(), sep="\n", end="")
    if args.parts:
        print_parts(gpu)


def tables_of(gpu: GPU, results: Path) -> dict[str, str]:
    """The tables in Markdown, by the line that each begins behind."""
    return {
        BEGIN: table(gpu, read_measured(results, gpu)),
        BEGIN_CLUSTERS: cluster_table(gpu),
        BEGIN_LAYERS: layer_table(gpu),
        BEGIN_GRADIENTS: gradient_table(gpu),
    }


def products(shape: Shape, tokens: int, result_bytes: int = 4) -> tuple[Product, Product]:
    """Gate and up, and down with its results in float32, as a layer asks for them, or in fewer bytes."""
    sizes = likely_sizes(tokens, shape.per_token, shape.experts)
    gate_up = Product(sizes=sizes, halves=2, N=shape.expert_width, K=shape.width)
    return gate_up, Product(sizes=sizes, halves=1, N=shape.width, K=shape.expert_width, out_bytes=result_bytes)


def tiles_of(product: Product) -> Any:
    """The tiles that the kernel chooses."""
    return choose_tiles(problem_of(product))


def problem_of(product: Product) -> Problem:
    """The product as the kernel sees it, which knows the number of rows alone, and gathers those of gate and up."""
    sizes = {name: getattr(product, name) for name in ("halves", "N", "K", "row_bytes", "out_bytes", "weight_bits")}
    return Problem(R=product.rows, G=len(product.sizes), gathered=product.halves == 2, **sizes)


def predictions(shape: Shape, tokens: int, gpu: GPU, result_bytes: int = 4) -> tuple[Prediction, Prediction]:
    """The predicted times of both products."""
    gate_up, down = products(shape, tokens, result_bytes)
    return predict(gate_up, tiles_of(gate_up), gpu), predict(down, tiles_of(down), gpu)


def table(gpu: GPU, measured: Measured) -> str:
    """The table in Markdown."""
    seen = f" measured on {gpu.name} |" if measured else ""
    lines = [
        f"| experts | tokens | gate and up, µs | bound by | down, µs | bound by | both | floor |{seen}",
        f"|---|---|---|---|---|---|---|---|{'---|' if measured else ''}",
    ]
    for name, shape in SHAPES.items():
        for tokens in TOKENS:
            up, down = predictions(shape, tokens, gpu)
            sizes = products(shape, tokens)[0].sizes
            touched = sum(size > 0 for size in sizes)
            floor = floor_of(Case(name, shape, "mlp", tokens, "uniform", "bfloat16"), touched, 2)
            both, least = up.seconds + down.seconds, floor.seconds(gpu.flops, gpu.memory_bandwidth)
            cells = [name, str(tokens), _us(up.seconds), up.bound, _us(down.seconds), down.bound, _us(both), _us(least)]
            if measured:
                seconds, session = measured.get((name, tokens), (None, ""))
                cells.append("" if seconds is None else f"{_us(seconds)} ({session})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cluster_table(gpu: GPU) -> str:
    """The table of products that have clusters, beside the best tiles without, in Markdown."""
    lines = [
        "| experts | tokens | product | blocks alone, µs | in clusters, µs | of the product | of both |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, shape), tokens in itertools.product(SHAPES.items(), TOKENS):
        both = sum(prediction.seconds for prediction in predictions(shape, tokens, gpu))
        for what, product in zip(("gate and up", "down"), products(shape, tokens), strict=True):
            tiles, problem = tiles_of(product), problem_of(product)
            if tiles.cluster == 1:
                continue
            alone = min((each for each in candidate_tiles(problem) if each.cluster == 1), key=problem.cost)
            before, after = (predict(product, each, gpu).seconds for each in (alone, tiles))
            saved = before - after
            cells = [_us(before), _us(after), f"−{saved / before:.0%}", f"−{saved / (both + saved):.0%}"]
            lines.append(f"| {' | '.join([name, str(tokens), what, *cells])} |")
    return "\n".join(lines) + "\n"


def layer_table(gpu: GPU) -> str:
    """The table in Markdown of layers: rows gathered before the products, or by them, and results in 4 bytes, or in 2."""
    lines = [
        "| experts | tokens | products, µs | rows gathered before | results added up | all | gathered by the kernel saves | "
        "results in bfloat16 would save |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        for tokens in TOKENS:
            rows = sum(likely_sizes(tokens, shape.per_token, shape.experts))
            gathered = gather_seconds(tokens, rows, shape.width, 2, gpu)
            both, added = {}, {}
            for result_bytes in (4, 2):
                both[result_bytes] = sum(each.seconds for each in predictions(shape, tokens, gpu, result_bytes))
                added[result_bytes] = sum_seconds(tokens, rows, shape.width, result_bytes, 2, gpu)
            whole = both[4] + gathered + added[4]
            saved = (gathered, both[4] + added[4] - both[2] - added[2])
            cells = [*map(_us, (both[4], gathered, added[4], whole)), *(f"{part / whole:.1%}" for part in saved)]
            lines.append(f"| {' | '.join([name, str(tokens), *cells])} |")
    return "\n".join(lines) + "\n"


def gradient_table(gpu: GPU) -> str:
    """The table of backward passes in Markdown."""
    lines = [
        "| experts | tokens | first product again, µs | dh | dx | dW_up | dW_down | between | backward | floor | forward |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        for tokens in TRAINED_TOKENS:
            sizes = likely_sizes(tokens, shape.per_token, shape.experts)
            D, F = shape.width, shape.expert_width
            whole, found = predict_gradient(sizes, D, F, gpu)
            parts = [prediction.seconds for prediction in found.values()]
            # Two products of each matrix; rows, dy and matrices read once, gradients of rows and matrices written.
            flops = 2 * 2 * sum(sizes) * 3 * D * F
            floor = max(flops / gpu.flops, 2 * (2 * len(sizes) * 3 * D * F + 3 * sum(sizes) * D) / gpu.memory_bandwidth)
            forward = sum(prediction.seconds for prediction in predictions(shape, tokens, gpu))
            cells = [*map(_us, [*parts, whole - sum(parts), whole, floor, forward])]
            lines.append(f"| {' | '.join([name, str(tokens), *cells])} |")
    return "\n".join(lines) + "\n"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"


def print_parts(gpu: GPU) -> None:
    """Print the tiles and the parts of each time, in microseconds."""
    for name, shape in SHAPES.items():
        for tokens in TOKENS:
            for what, product in zip(("gate and up", "down"), products(shape, tokens), strict=True):
                tiles = tiles_of(product)
                prediction = predict(product, tiles, gpu)
                parts = ", ".join(f"{part} {_us(seconds)}" for part, seconds in prediction.parts.items() if seconds)
                waves = f"{prediction.tiles} tiles in {prediction.waves} waves"
                print(f"{name}, {tokens} tokens, {what}: {parts}; {waves}, {tiles}")


def read_measured(folder: Path, gpu: GPU) -> Measured:
    """What sessions on that kind of GPU measured of the kernel's MLPs, the newest of each case; not what is on a CPU."""
    found: Measured = {}
    for file in sorted(folder.glob(f"*/{RESULTS}")):
        results = read_results(file.parent)
        devices = {line.get("device") for line in results if line.get("kind") == "machine"}
        if devices != {gpu.name}:
            continue
        for line in results:
            ours = line.get("kind") == "speed" and line.get("side") == "mosaic_gpu" and line.get("routing") == "uniform"
            if ours and not line.get("tuned"):
                found[line["shape"], line["tokens"]] = line["seconds"], file.parent.name
    return found


if __name__ == "__main__":
    main()
