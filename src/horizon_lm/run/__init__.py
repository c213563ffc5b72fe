"""The training loop, the model handle, export and metrics."""
