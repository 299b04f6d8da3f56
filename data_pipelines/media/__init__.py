"""Media files: where they are (location), how large (probe_...), their pixels and samples (decode_...), features.

What a file is called when it is refused stands in file_kinds, what it may be at most in containers.
"""
