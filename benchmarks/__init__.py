"""Benchmarks. Each module has `main(argv)` and writes a dated file under results/."""
