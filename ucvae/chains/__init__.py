"""Coupled Markov chains that turn a log-weight function into signed particles.

A library in its own right: :func:`run_lagged_chains` needs ``log_weight(noise, image_index)`` and a
``torch.Generator``, no model and no autograd.
"""

from ucvae.chains.lagged import Kernel, run_lagged_chains
from ucvae.chains.measure import LaggedChains, LogWeight, SignedParticles
from ucvae.chains.moves import ComposedKernel, Move

__all__ = [
    "ComposedKernel",
    "Kernel",
    "LaggedChains",
    "LogWeight",
    "Move",
    "SignedParticles",
    "run_lagged_chains",
]
