"""The report of a study: figures, one self-contained page, and the same content as data."""
