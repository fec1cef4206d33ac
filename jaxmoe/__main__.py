"""``python -m jaxmoe``: the same as the ``jaxmoe`` command."""

import sys

from jaxmoe.cli import main

sys.exit(main())
