"""Time and memory, beside peers."""
