r"""Fewer signed particles for the same expectation, before a pass that is dear for each of them."""

from __future__ import annotations

import torch

from ucvae.chains.measure import SignedParticles

# What the number of thinned particles in a differentiable pass is a multiple of, where it is large.
MULTIPLE = 128


def thin(
    particles: SignedParticles, min_coefficient: float, generator: torch.Generator
) -> SignedParticles:
    """Drop most particles of little weight so that every expectation stays the same.

    A particle with ``|c| < m`` survives with probability ``|c| / m`` and then has the coefficient
    ``sign(c) m``. Which ones survive is decided by systematic resampling (Kitagawa 1996): the light
    particles of an image lie end to end on a line, as long as ``|c| / m`` each, and those survive
    in which one of the points u, u + 1, u + 2, ... falls, with one uniform u for the image. So
    their number is all but fixed, and neighbours in time, which resemble each other, stand in for
    each other: less variance than independent decisions would add. The coefficients of an image add
    up to 1 in expectation only.

    Args:
        particles: G groups of K.
        min_coefficient: m; at 0 the particles are returned as they are.
        generator: on the particles' device.

    Returns:
        The survivors, in groups of one, those of an image together.
    """
    if min_coefficient == 0 or not len(particles.image_index):
        return particles
    image_index, groups = particles.image_index.sort(stable=True)
    coefficient = particles.coefficient[groups]
    # Float64: a line may be long, and its points are told apart by differences.
    length = coefficient.abs().double() / min_coefficient
    light = length < 1
    length = torch.where(light, length, 0)
    of_image = length.new_zeros(int(image_index[-1]) + 1)
    of_image.index_add_(0, image_index, length.sum(-1))
    uniform = torch.rand(
        of_image.shape, generator=generator, device=length.device, dtype=length.dtype
    )
    end = length.flatten().cumsum(0).view_as(length)
    end = end + (uniform - (of_image.cumsum(0) - of_image))[image_index][:, None]
    group, slot = ((end.floor() > (end - length).floor()) | ~light).nonzero(as_tuple=True)
    kept = coefficient[group, slot]
    return SignedParticles(
        image_index[group],
        particles.noise[groups[group], slot][:, None],
        (kept.sign() * kept.abs().clamp(min=min_coefficient))[:, None],
    )


def padded(particles: SignedParticles) -> SignedParticles:
    """The same measure, thinned particles made up to a round number by ones with coefficient 0.

    How many survive differs from call to call, and a library may prepare its matrix products for
    each size anew, at the price of several products. At most an eighth more are passed.
    """
    count = len(particles.image_index)
    missing = -count % min(MULTIPLE, 1 << max(0, count.bit_length() - 4))
    if missing == 0 or particles.noise.shape[1] > 1:
        return particles
    last = (part[-1:].expand(missing, *part.shape[1:]) for part in particles)
    padding = SignedParticles(*last)
    return SignedParticles.join(
        [particles, padding._replace(coefficient=torch.zeros_like(padding.coefficient))]
    )
