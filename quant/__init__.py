"""Checkpoint files: their headers, what they are, how their tensors are stored.

A library of its own: it knows nothing of prompts, pictures or `fluxcli`. Sizes are in bytes.
"""
