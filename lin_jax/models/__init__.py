"""Language models, made of NNX modules."""
