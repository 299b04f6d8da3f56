"""Scores of what was trained: held-out losses during training, and audio against what it was made from."""
