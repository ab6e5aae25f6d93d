"""A checkpoint becomes a vindex: tensors one at a time, singular directions with a certificate."""
