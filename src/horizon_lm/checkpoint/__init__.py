"""Checkpoints: all that a bitwise-identical resume needs, written atomically and verified when read."""
