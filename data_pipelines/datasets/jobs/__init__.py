"""Resumable jobs over units of work: each a pure function that writes the files of one unit, run anywhere."""
