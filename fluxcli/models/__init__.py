"""Where weights and adapters are: bundled, in folders, in the hub's cache; and how they get there."""
