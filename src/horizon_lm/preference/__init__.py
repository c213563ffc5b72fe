"""Preference optimisation: losses, the reference's log-probabilities, the method of a run."""
