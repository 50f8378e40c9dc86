"""Models that other code builds: when they are made, loaded and first run, and what became of their weights."""
