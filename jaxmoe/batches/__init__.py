"""Files of prompts: generation for every line, which goes on where a killed run has stopped.

`generate_file` is the whole of it for a model that is there. `Batch` and `run_batch` are its two halves: what can be refused
is refused by the first, before weights are read.
"""

from jaxmoe.batches.api import generate_file, run_batch
from jaxmoe.batches.fingerprint import checkpoint_hash
from jaxmoe.batches.run import Batch, BatchResult
from jaxmoe.batches.settings import LineSettings

__all__ = ["Batch", "BatchResult", "LineSettings", "checkpoint_hash", "generate_file", "run_batch"]
