"""What this machine has, and whether a run fits it."""

# Set by the command `horizon`: nothing in this process has changed transformers' models, so that what earlier
# plans found out about them holds (`outline_cache`). In a user's own program that is not known.
models_are_stock = False
