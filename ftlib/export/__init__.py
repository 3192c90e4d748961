"""From the last checkpoint to files other programs load: adapter, merged weights, and the proof that they are equal.
May import what train may, and train."""
