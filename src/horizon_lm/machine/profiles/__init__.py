"""Machines as data: one YAML file each, with the source of every figure. `plan.profile` reads them."""
