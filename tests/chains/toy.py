"""A target without symmetry, a different one for each image."""

import torch

from ucvae.chains.kernels import StepNoise


def toy_log_weight(noise, image_index):
    """``[n, k, D]`` to ``[n, k]``: smooth, skew, unequal over dimensions and images."""
    centre = torch.sin(1.7 * image_index.to(noise.dtype) + 0.3)[:, None, None]
    scale = 0.5 + torch.arange(noise.shape[-1]).to(noise) / noise.shape[-1]
    offset = noise - centre
    return (-scale * offset**2 + 0.8 * torch.sin(2 * offset)).sum(-1)


def steep_log_weight(noise, image_index):
    """The same with more uneven weights, so that chains take long to meet."""
    return 4 * toy_log_weight(noise, image_index)


def of_image(image, log_weight=toy_log_weight):
    """A log weight for the literal algorithms: one image, one noise vector, a float."""
    index = torch.tensor([image])
    return lambda xi: float(log_weight(xi[None, None], index)[0, 0])


def row(noise, i):
    """The noise of one row of a batch, as the literal algorithms take it."""
    return StepNoise(noise.slot[i], noise.fresh[i], noise.uniforms[i])


def incumbent_first(state):
    """A literal state's samples and weights in the fast code's order of slots."""
    a = state.slot
    order = [a, *(k for k in range(len(state.samples)) if k != a)]
    noise = torch.stack([state.samples[k] for k in order])
    return noise, torch.tensor([state.weights[k] for k in order], dtype=torch.float64)
