"""Where weights and adapters are, and how they get there."""
