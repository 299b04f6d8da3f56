"""Text tokenizers and the names of the special tokens."""
