"""Text sources, tokenizers, and rows of tokens made from them."""
