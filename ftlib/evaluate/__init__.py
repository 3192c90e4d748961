"""How good the model is: generation, function-call scores, perplexity.
May import everything left of it; nothing imports it but jobs."""
