"""Encoded features on disk: the tables, the journal of an unfinished one, and the encoding itself."""
