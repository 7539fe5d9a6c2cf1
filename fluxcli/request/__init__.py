"""What is wanted: requests, presets, rows and jobs. Stdlib only."""
