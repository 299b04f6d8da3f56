"""Documents with their media in ArrayRecord shards: one record a document, one `dataset.json` a folder."""
