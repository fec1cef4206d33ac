"""Continuous batching: requests come and go, programs and memory stay.

`ContinuousEngine` is what others use. What it decides is in `scheduler`, `pages`, `job` and `sizes`, in plain Python, and
in `room` from what memory is left; what the devices do is in `layout`, `programs` and `edits`, and `inputs` tells them.
"""

from jaxmoe.generation.continuous.engine import ContinuousEngine
from jaxmoe.generation.continuous.room import plan_sizes

__all__ = ["ContinuousEngine", "plan_sizes"]
