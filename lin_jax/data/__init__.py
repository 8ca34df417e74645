"""Text in, rows of tokens out: sources, tokenizers and a checkpointable input pipeline on Grain."""
