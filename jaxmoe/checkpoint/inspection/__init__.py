"""The summary of a checkpoint, from its headers and its config.json alone."""

from jaxmoe.checkpoint.inspection.digests import CheckedDigests, check_digests
from jaxmoe.checkpoint.inspection.grouping import group_of
from jaxmoe.checkpoint.inspection.summary import CheckpointSummary, summarize

__all__ = [
    "CheckedDigests",
    "CheckpointSummary",
    "check_digests",
    "group_of",
    "summarize",
]
