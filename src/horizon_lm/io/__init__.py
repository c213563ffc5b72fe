"""Files, console output and the Hub: what enters and leaves the process."""
