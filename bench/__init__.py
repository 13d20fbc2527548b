"""Measurements: speed and memory of the operator beside its peers, as records under bench/results. Not part of the installed package."""
