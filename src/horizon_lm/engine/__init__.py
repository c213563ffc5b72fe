"""Runs a schedule: lanes execute ops, one table maps each op kind to its function."""
