"""Variational auto-encoders trained by unbiased gradients of the log-likelihood.

The method is that of Ruiz, Titsias, Cemgil and Doucet, *Unbiased Gradient Estimation for
Variational Auto-Encoders using Coupled Markov Chains* (UAI 2021, arXiv 2010.01845).
"""

__version__ = "0.1.0"
