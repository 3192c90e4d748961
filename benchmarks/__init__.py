"""Measurements: each file is a command (`make bench ARGS=login`) that prints ratios to a peer measured in the same run.
No test depends on them."""
