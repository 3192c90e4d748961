"""What is known before a job is queued: resources, memory, time and cost.
Pure functions of spec, profile and model shape: no I/O, no Slurm, no torch."""
