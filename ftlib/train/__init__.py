"""Training on the compute node: model loading, the trainer, the stop flag, committed checkpoints, tracking.
May import ground, plan and data; nothing of export or evaluate."""
