"""The ``jaxmoe`` command, one file a subcommand."""

from jaxmoe.cli.command import main

__all__ = ["main"]
