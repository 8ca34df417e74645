"""Kinds of attention, one file a kind."""
