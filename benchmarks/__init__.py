"""Benchmarks: real programs beside each other in one run, on one machine, as tables."""
