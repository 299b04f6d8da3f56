"""Baichuan-Omni-1.5 in JAX: text, images, video and speech in; text and speech out; trainable end to end.

This file imports neither jax nor flax: data workers import the package for its configuration alone.
"""

__version__ = "0.2.0"
