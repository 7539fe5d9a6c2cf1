"""From checkpoints to pixels. torch begins here."""
