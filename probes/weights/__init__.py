"""Changed weights as files: where a tensor lies in a checkpoint, rank-1 patches, baked checkpoints."""
