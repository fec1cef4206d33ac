"""Saving: the mapping the other way round, from a model on a mesh or from files to a new directory."""

from jaxmoe.checkpoint.saving.report import SaveReport
from jaxmoe.checkpoint.saving.save import convert, save

__all__ = [
    "SaveReport",
    "convert",
    "save",
]
