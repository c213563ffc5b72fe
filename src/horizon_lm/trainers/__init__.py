"""Trainers of TRL and transformers on the streamed engine."""
