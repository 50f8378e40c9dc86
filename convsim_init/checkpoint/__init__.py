"""Files of weights: written, read, vetted and matched with a model."""
