"""Continuous batching: requests come and go, programs and memory stay.

`ContinuousEngine` is what others use. What it decides is in `scheduler`, `pages`, `job` and `sizes`, in plain Python; what
the devices do is in `layout`, `programs` and `edits`.
"""

from jaxmoe.generation.continuous.engine import ContinuousEngine, plan_sizes

__all__ = ["ContinuousEngine", "plan_sizes"]
