#!/usr/bin/env python3
"""How long does a model take from the command to its first token, the first time and with its programs kept?

It starts `jaxmoe generate` on the demo checkpoint, or another, with an empty compile cache and then with the one that the
first start has filled, in turns, and prints wall clock and processor time of both, and the ratio. Python's own bytecode is
written and files are read once before, so that neither counts for the first start. With --imports it times `import jaxmoe`
and `jaxmoe inspect` too. Removes what it wrote.

    python scripts/bench_start.py
    python scripts/bench_start.py path/to/checkpoint --repeats 5 --json
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Times = dict[str, list[float]]


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=str(ROOT / "demo"), help="a checkpoint directory (the demo)")
    parser.add_argument("--simulate", type=int, default=8, help="simulated devices, 0 for those that are here (8)")
    parser.add_argument("--mesh", default="dp=2,tp=2,ep=2", help="mesh sizes (dp=2,tp=2,ep=2)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of starts (3)")
    parser.add_argument("--imports", action="store_true", help="also time `import jaxmoe` and `jaxmoe inspect`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxmoe-start-") as folder:
        result = measure(args, Path(folder))
    print(json.dumps(result) if args.json else as_text(result))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Time all starts; wall clock and processor time in seconds, the median of each."""
    jaxmoe = [sys.executable, "-m", "jaxmoe"]
    generate = [
        *jaxmoe,
        "generate",
        args.checkpoint,
        "--prompt-ids",
        "1,2,3",
        "--max-new-tokens",
        "2",
        "--mesh",
        args.mesh,
    ]
    generate += ["--simulate", str(args.simulate)] if args.simulate else []
    kinds = {"import jaxmoe": [sys.executable, "-c", "import jaxmoe"], "inspect": [*jaxmoe, "inspect", args.checkpoint]}
    kinds = kinds if args.imports else {}
    for command in (generate, *kinds.values()):
        start(command, folder, folder / "warm up")
    times: dict[str, Times] = {}
    for turn in range(args.repeats):
        for name, command in {"first start": generate, "second start": generate, **kinds}.items():
            wall, processor = start(command, folder, folder / f"cache {turn}")
            found = times.setdefault(name, {"wall": [], "processor": []})
            found["wall"].append(wall)
            found["processor"].append(processor)
    medians = {
        name: {kind: statistics.median(values) for kind, values in found.items()} for name, found in times.items()
    }
    ratios = {kind: medians["second start"][kind] / medians["first start"][kind] for kind in ("wall", "processor")}
    return {"seconds": medians, "second over first": ratios}


def start(command: list[str], folder: Path, cache: Path) -> tuple[float, float]:
    """Run a command to its end; wall clock and processor time in seconds."""
    # What a cache of the caller has would make the first start a second one.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = {name: value for name, value in environment.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    environment |= {"XDG_CACHE_HOME": str(cache), "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "PYTHONPATH": str(ROOT)}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def as_text(result: dict) -> str:
    """The same for people."""
    lines = [
        f"{name:14} {times['wall']:6.2f} s, {times['processor']:6.2f} s of processor time"
        for name, times in result["seconds"].items()
    ]
    ratios = result["second over first"]
    return "\n".join([*lines, f"second over first: {ratios['wall']:.2f}, {ratios['processor']:.2f} of processor time"])


if __name__ == "__main__":
    main()
