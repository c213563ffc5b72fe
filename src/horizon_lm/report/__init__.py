"""What a run reports: metrics, FLOPs, loggers, the live display, the HTML report, the loss curve."""
