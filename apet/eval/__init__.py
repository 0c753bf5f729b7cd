"""Evaluation: benchmarks, their metrics, and the loop that runs a model over them."""
