"""Forward passes on unknown values, and what they tell of layers: nothing of the model itself is run."""
