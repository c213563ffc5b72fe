"""The command line: each verb parses its arguments, builds a configuration and makes one call."""

from horizon_lm.cli.command import app, main

__all__ = ["app", "main"]
