"""Saving: the mapping the other way round, from a model on a mesh or from files to a new directory."""

from jaxmoe.checkpoint.saving.save import SaveReport, convert, save

__all__ = [
    "SaveReport",
    "convert",
    "save",
]
