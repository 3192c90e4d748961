"""Kill runs on a real Slurm in every way and at every place, and prove that nothing of the result changes.

    python -m benchmarks.chaos [--kills N] [--seed S] [--write docs/chaos.md]
"""
