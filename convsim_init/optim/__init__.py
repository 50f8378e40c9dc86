"""The loops that lower a loss, over a backend; they know no module."""
