"""From manifests and loose media files to ArrayRecord shards with the media inside: planned, built, described."""
