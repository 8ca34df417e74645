"""Softmax attention over whole rows, with a bias, windows, and a cache."""
