"""Data: synthesis, formats, sources, tokenising and packing of instruction pairs.
Synthesis and formats are pure Python; nothing here trains, submits or reads a run's state."""
