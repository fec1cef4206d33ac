"""``python -m jaxmoe``: the same as the ``jaxmoe`` command."""

import gc
import sys
from typing import NoReturn

from jaxmoe.cli import main


def run() -> NoReturn:
    """Run the command line in a process of its own, which ends with it."""
    status = main()
    # Everything goes with the process. Its last collections would go over all that imports have made.
    gc.freeze()
    sys.exit(status)


if __name__ == "__main__":
    run()
