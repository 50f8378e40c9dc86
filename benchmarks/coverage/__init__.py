"""How many of other people's models are treated, and for how long without a leak."""
