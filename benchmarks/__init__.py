"""Measurements of the package: speed, training, the paper's claims, coverage; each a package to be run."""
