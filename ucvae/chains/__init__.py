"""Coupled Markov chains that turn a log-weight function into signed particles.

A library in its own right: :func:`run_lagged_chains` needs ``log_weight(noise, image_index)`` and a
``torch.Generator``, no model and no autograd.
"""

from ucvae.chains.lagged import Kernel, run_lagged_chains
from ucvae.chains.measure import LaggedChains, LogWeight, SignedParticles

__all__ = ["Kernel", "LaggedChains", "LogWeight", "SignedParticles", "run_lagged_chains"]
