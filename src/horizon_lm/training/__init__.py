"""A training run from settings to an exported model."""
