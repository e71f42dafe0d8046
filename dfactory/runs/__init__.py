"""A run: its folder, who holds it, its metrics and trackers, its sanity checks and what it decodes at evaluations."""
