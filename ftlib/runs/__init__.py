"""What happened to a run and what happens next: typed events, the ledger, diagnosis, policy and the one reducer.
Standard library only, for the batch host runs it outside any container; nothing here talks to Slurm."""
