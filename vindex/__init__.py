"""Read, verify and score a vindex: the singular directions of a model's FFN layers."""
