"""Training runs, from settings to an exported model."""
