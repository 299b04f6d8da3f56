"""A small real data set, built offline: photographs, synthesized speech, videos, and documents about them."""
