"""Fast value and gradient of what `functional` defines: one protocol, several implementations."""
