"""Which files are checkpoints, and writing a file whole or not at all."""
