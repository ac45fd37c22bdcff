"""Densities and networks: no objective, no data."""
