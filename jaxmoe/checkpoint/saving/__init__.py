"""Saving: the mapping the other way round, from a model on a mesh or from files to a new directory."""

from jaxmoe.checkpoint.saving.orbax import OrbaxReport, convert_to_orbax
from jaxmoe.checkpoint.saving.report import SaveReport
from jaxmoe.checkpoint.saving.save import convert, save

__all__ = [
    "OrbaxReport",
    "SaveReport",
    "convert",
    "convert_to_orbax",
    "save",
]
