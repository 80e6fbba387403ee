"""Benchmarks: ratios against a baseline in the same run, never absolute promises. `make bench` runs them all."""
