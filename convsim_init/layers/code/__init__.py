"""What the code of modules says of the weights that they use: it is read, nothing is run."""
