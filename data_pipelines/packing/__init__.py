"""From documents' lengths to batches of packed rows. `pack` alone packs lengths, without configuration or files."""

from data_pipelines.packing.packer import pack

__all__ = ["pack"]
