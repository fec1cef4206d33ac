"""One job of a session, by its name: `python -m scripts._session.jobs NAME [KERNEL]`. It prints a line of JSON a result."""

import importlib
import sys

# From the name of a job to the module beside this one that has the function of that name.
JOBS = {
    "machine": "contact",
    "alive": "contact",
    "trivial_kernel": "contact",
    "first_light": "correctness",
    "plain_variants": "correctness",
    "packed_variants": "correctness",
    "ceilings": "speed",
    "expert_mlps": "speed",
    "few_rows": "speed",
    "skewed": "speed",
    "tuning": "tuned",
    "headline": "tuned",
    "exchange": "exchange",
    "dispatches": "exchange",
    "layer": "layers",
    "model_4": "models",
    "model_48": "models",
}


def main() -> None:
    """Run the job that the command line names."""
    name, *kernels = sys.argv[1:]
    function = getattr(importlib.import_module(f"scripts._session.{JOBS[name]}"), name)
    function(*(kernel.partition(".")[0] for kernel in kernels))


if __name__ == "__main__":
    main()
