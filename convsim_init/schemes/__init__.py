"""Known ways to start from: base weights drawn by a scheme, and layers scaled to unit variance."""
