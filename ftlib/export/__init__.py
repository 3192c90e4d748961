"""Files for other programs, and the proof that they equal the checkpoint. May import what train may, and train."""
