"""From a module or a state dict to the filter banks of its convolutions, and back."""
