"""How good the model is. May import everything left of it; nothing imports it but jobs."""
