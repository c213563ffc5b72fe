"""Checkpoints: everything a run needs to go on with the same bits; whole or absent, and checked when read."""
