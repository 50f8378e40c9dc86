"""The models that can be built, wherever they come from."""
