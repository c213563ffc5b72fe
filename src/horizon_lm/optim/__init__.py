"""The parameter update on the host, and learning-rate curves."""
