"""Trains the model in demo/: a small Qwen3-MoE on the source text of the Python standard library, through jaxmoe's layer.

The mesh is simulated. The run's directory keeps checkpoints, log and settings; the same command goes on after a kill at
any time. The same seed, Python and versions give the same run, within rounding.

    python scripts/train_demo.py                  # trains, then writes demo/
    python scripts/train_demo.py --finish         # writes demo/ from the newest checkpoint, without training further
    python scripts/train_demo.py --steps 300 --run build/short --out build/demo-short

Needs the extra "train": pip install ".[train]".
"""

import argparse
import dataclasses
import hashlib
import math
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

import jaxmoe
from jaxmoe.layers import params_by_path
from jaxmoe.mesh import padded_batch, parse_mesh
from jaxmoe.models import Decoder
from scripts._train import corpus
from scripts._train.card import model_card
from scripts._train.model import CONFIG, make_model, write_side_files
from scripts._train.plot import loss_curve
from scripts._train.result import export, measure, save_traces, text_bytes
from scripts._train.run import HeldOut, Run, train
from scripts._train.step import Recipe, Trainer


def main() -> None:
    """Corpus, model, training, result."""
    args = parse_arguments()
    try:
        sizes, recipe = parse_mesh(args.mesh), Recipe(steps=args.steps)
        if not args.checkpoint_minutes >= 0:
            raise ValueError(f"--checkpoint-minutes is a number of at least 0; got {args.checkpoint_minutes}")
    except ValueError as error:
        raise SystemExit(f"scripts/train_demo.py: {error}") from error
    jaxmoe.simulate_devices(math.prod(sizes.values()))
    mesh = jaxmoe.make_mesh(**sizes)
    if padded_batch(mesh, recipe.rows) != recipe.rows:
        raise SystemExit(
            f"scripts/train_demo.py: a batch of {recipe.rows} rows is split evenly over dp and ep; got --mesh {args.mesh}"
        )

    text = read_text(CONFIG["vocab_size"])
    settings = {
        "recipe": dataclasses.asdict(recipe),
        "config": CONFIG,
        "seed": args.seed,
        "mesh": sizes,
        "python": platform.python_version(),
        "text": hashlib.sha256(text.stream.tobytes()).hexdigest(),
    }
    try:
        run = Run(args.run, settings)
    except ValueError as error:
        raise SystemExit(f"scripts/train_demo.py: {error}") from error
    with run:
        write_side_files(run.directory / "model", CONFIG, text.tokenizer)
        try:
            model = make_model(
                run.directory / "model", mesh, seed=args.seed, expert_axes=("ep", "tp"), dispatch=args.dispatch
            )
        except (ValueError, NotImplementedError) as error:
            raise SystemExit(f"scripts/train_demo.py: {error}") from error
        trainer = Trainer(model, recipe)
        batches = corpus.Batches(text.stream, length=recipe.length, rows=recipe.rows, seed=args.seed)
        held_out = HeldOut(*corpus.windows(text.held_out_stream, recipe.length))
        if args.finish:
            if run.checkpoints.latest_step() is None:
                raise SystemExit(f"scripts/train_demo.py: --finish needs a checkpoint, and {args.run} has none yet")
            state = run.restore(trainer.init())
        else:
            state = train(run, trainer, batches, held_out, checkpoint_minutes=args.checkpoint_minutes)
        export(model, state.params, args.out)
        write_findings(args, recipe, int(state.step), text, held_out, run.log(), mesh)


class Text(NamedTuple):
    """The corpus, its tokenizer, and both sides as tokens."""

    documents: corpus.Corpus
    tokenizer: Tokenizer
    stream: np.ndarray
    held_out_stream: np.ndarray


def read_text(vocab_size: int) -> Text:
    """Read and encode the standard library; prints how much of it there is."""
    documents = corpus.split(corpus.standard_library())
    tokenizer = corpus.train_tokenizer((document.text for document in documents.train), vocab_size)
    text = Text(
        documents, tokenizer, corpus.encode(documents.train, tokenizer), corpus.encode(documents.held_out, tokenizer)
    )
    print(f"to train on: {len(documents.train)} files, {len(text.stream):,} tokens")
    print(f"held out: {len(documents.held_out)} files, {len(text.held_out_stream):,} tokens")
    return text


def write_findings(
    args: argparse.Namespace,
    recipe: Recipe,
    steps_done: int,
    text: Text,
    held_out: HeldOut,
    log: list[dict[str, Any]],
    mesh: Mesh,
) -> None:
    """Measure what was written to args.out, and write traces, picture and card beside it."""
    model = jaxmoe.load(args.out, mesh=mesh, dtype="float32")
    measured = measure(model, held_out, text.documents, (text.stream, text.held_out_stream))
    for name, bits in measured.bits_per_byte.items():
        print(f"{name:>12}: {bits:.3f} bits per byte of held-out text")
    save_traces(measured.trace, args.out / "traces")
    baselines = {name: bits for name, bits in measured.bits_per_byte.items() if name.endswith("gram")}
    held_out_bytes = sum(text_bytes(document) for document in text.documents.held_out)
    bytes_per_token = held_out_bytes / (len(text.held_out_stream) - 1)
    loss_curve(log, baselines, bytes_per_token * math.log(2), args.out / "loss.png")
    card = model_card(
        recipe=recipe,
        steps_done=steps_done,
        command=f"python scripts/train_demo.py --steps {args.steps} --seed {args.seed} --mesh {args.mesh}",
        mesh=args.mesh,
        config=CONFIG,
        parameters=sum(int(param.get_value().size) for param in params_by_path(model).values()),
        active=active_parameters(model),
        documents=text.documents,
        tokenizer=text.tokenizer,
        stream=text.stream,
        held_out_stream=text.held_out_stream,
        log=log,
        measured=measured,
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    for path in sorted(path for path in args.out.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>10,d}  {path.relative_to(args.out)}")


def active_parameters(model: Decoder) -> int:
    """Parameters that one token uses: of the experts its K of E."""
    share = CONFIG["num_experts_per_tok"] / CONFIG["num_local_experts"]
    return round(
        sum(
            param.get_value().size * (share if ".moe.w_gate_up" in path or ".moe.w_down" in path else 1)
            for path, param in params_by_path(model).items()
        )
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="updates in all (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--mesh", default="dp=2,tp=2,ep=2", help="sizes of the mesh's axes (default: dp=2,tp=2,ep=2)")
    parser.add_argument("--dispatch", default="replicated", help="a backend of jaxmoe.dispatch (default: replicated)")
    parser.add_argument("--run", type=Path, default=ROOT / "build/train_demo", help="checkpoints and log")
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="the folder to write (default: demo/)")
    parser.add_argument("--checkpoint-minutes", type=float, default=5, help="between two checkpoints (default: 5)")
    parser.add_argument("--finish", action="store_true", help="train no further: write the newest checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    main()
