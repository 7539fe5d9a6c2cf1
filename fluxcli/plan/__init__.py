"""Bytes, seconds, placement and precision: arithmetic only. Opens no file. Stdlib only."""
