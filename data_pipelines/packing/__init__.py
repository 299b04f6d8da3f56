"""From documents' lengths to batches of packed rows. `pack` alone packs lengths, without configuration or files.

index (lengths of every document) -> mixture (one stream) -> packer (rows) -> row_plan (steps) -> rows (decoded, by
workers) -> batch (arrays) -> context_plan (which shard gets which tokens)
"""

from data_pipelines.packing.packer import pack

__all__ = ["pack"]
