"""The training loop and its parts: step, optimizer, sharding, checkpoints, metrics."""
