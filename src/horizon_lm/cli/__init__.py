"""The command line: each verb parses its arguments, builds a configuration and makes one call."""

from horizon_lm.cli.app import main

__all__ = ["main"]
