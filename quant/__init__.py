"""Checkpoint files: headers, kinds, packing. Knows nothing of prompts, pictures or `fluxcli`; sizes are in bytes."""
