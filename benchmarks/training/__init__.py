"""What the start of the weights does to training."""
