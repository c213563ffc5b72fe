"""This machine: cores, memory, device, and profiles of machines that are not at hand."""
