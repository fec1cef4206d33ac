"""The summary of a checkpoint, from its headers and its config.json alone."""

from jaxmoe.checkpoint.inspection.grouping import group_of
from jaxmoe.checkpoint.inspection.summary import CheckpointSummary, summarize

__all__ = [
    "CheckpointSummary",
    "group_of",
    "summarize",
]
