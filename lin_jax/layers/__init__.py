"""NNX modules from which the models are made."""
