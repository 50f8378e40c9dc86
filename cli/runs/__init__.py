"""The runs of the main command: which there are, doing one, doing many, and their results."""
