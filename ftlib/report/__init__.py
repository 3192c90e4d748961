"""What a person reads: tables and the run's report, made from the plain files of a run folder. No torch, no Slurm."""
