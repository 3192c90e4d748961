"""Everything said to Slurm and heard from it: sbatch texts, the queue, accounting, which cluster this is.
Runs on the login node: no torch."""
