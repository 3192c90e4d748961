"""Data: synthesis, formats, sources, tokenising and packing. Nothing here trains, submits or reads a run's state."""
