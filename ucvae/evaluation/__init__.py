"""Estimates of the log-likelihood of held-out images."""
