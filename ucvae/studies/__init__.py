"""Studies: measurements of a trained model that are no log-likelihood, with figures and tables."""
