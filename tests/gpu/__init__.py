"""What needs a CUDA device to be shown: `make gpu-check`, or `pytest -m gpu`."""
