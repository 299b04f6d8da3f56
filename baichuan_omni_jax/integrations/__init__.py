"""Adapters by which other projects' harnesses evaluate a checkpoint (docs/how-to/harnesses.md)."""
