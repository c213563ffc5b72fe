"""Plan a run for a machine: memory, time, and the settings that a configuration leaves open."""

# Set by the command `horizon`: nothing in this process has changed transformers' models, so that cached
# outlines hold (`outline_cache`). A user's own program may have changed them.
models_are_stock = False
