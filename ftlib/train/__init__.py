"""Training on the compute node. May import ground, plan and data; nothing of export or evaluate."""
