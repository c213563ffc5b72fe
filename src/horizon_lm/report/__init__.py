"""Reports of a run: metrics, FLOPs, loggers, live display, HTML page, picture of the loss."""
