"""What the forward pass of a module uses as the weight of a convolution."""
