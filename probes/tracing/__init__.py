"""What a model does with one prompt: its residual stream layer by layer, and what its FFNs read and write there."""
