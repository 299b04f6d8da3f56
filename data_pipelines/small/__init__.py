"""A compositional data set for a small model, built offline: digits, shapes, charts, motion, text; held-out parts."""
