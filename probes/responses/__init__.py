"""What a model's FFNs write when their gate directions are read: the responses of a vindex, measured."""
