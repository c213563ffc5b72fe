"""Files, console output and the Hub: everything that leaves the process or comes into it."""
