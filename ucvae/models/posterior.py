"""The posteriors of images in the coordinates of their proposals, with gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ucvae.models.gaussians import DefensiveMixture, Encoded, Proposal
from ucvae.models.layers import round_number
from ucvae.models.refinement import log_joint_gradient
from ucvae.models.vae import VAE


class Posterior:
    """``p(z|x)`` of n images, as :class:`ucvae.chains.hmc.Posterior` wants it.

    Coordinates are the noise of the proposal's Gaussian, of a mixture that of its main one: where
    it fits, the posterior is about ``N(0, I)`` in them.

    Args:
        model: the VAE.
        images: ``[n, P]``.
        proposal: of each; constant to autograd.
    """

    def __init__(self, model: VAE, images: Tensor, proposal: Proposal) -> None:
        self.model = model
        self.images = images
        self.proposal = proposal
        self.num_images = len(images)

    @property
    def gaussian(self) -> Encoded:
        """The one whose noise the coordinates are."""
        proposal = self.proposal
        return proposal.main if isinstance(proposal, DefensiveMixture) else proposal

    def rows(self, image_index: Tensor) -> Posterior:
        """That of the images at ``image_index``.

        How many they are differs from call to call: some are made up behind them, to a round
        number, which what is told of the others does not show.
        """
        count = len(image_index)
        if count == len(self.images):  # all of them, in their order: nothing to look up
            return self
        missing = min(round_number(count), len(self.images)) - count
        index = F.pad(image_index, (0, missing))
        images = self.images.index_select(0, index)
        some = Posterior(self.model, images, self.proposal.rows(index))
        some.num_images = count
        return some

    def log_weight(self, noise: Tensor) -> Tensor:
        """``log w`` of states in the proposal's noise ``[n, k, D']``; ``[n, k]``."""
        padded = self._padded(noise)
        return self.model.log_weight(self.images, self.proposal, padded)[: self.num_images]

    def coordinates(self, noise: Tensor) -> Tensor:
        """Of states in the proposal's noise ``[n, c, D']``; ``[n, c, D]``."""
        if not isinstance(self.proposal, DefensiveMixture):
            return noise
        noise = self._padded(noise)
        of_main = self.proposal.of_main(noise)[..., None]
        elsewhere = self.proposal.main.to_noise(self.proposal.transform(noise))
        return torch.where(of_main, noise[..., :-1], elsewhere)[: self.num_images]

    def log_density(self, coordinates: Tensor) -> Tensor:
        """``log p(x, z)`` ``[n, c]``."""
        z = self.gaussian.transform(self._padded(coordinates))
        return self.model.log_joint(self.images, z)[: self.num_images]

    def with_gradient(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and its gradient in the coordinates ``[n, c, D]``."""
        z = self.gaussian.transform(self._padded(coordinates))
        value, gradient = log_joint_gradient(self.model, self.images, z)
        gradient = self.gaussian.pull_back(gradient)
        return value[: self.num_images], gradient[: self.num_images]

    def states(self, coordinates: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
        """The proposal's noise of the z there, and their log weights."""
        noise = coordinates
        if isinstance(self.proposal, DefensiveMixture):
            noise = self.proposal.noise_of_main(coordinates)
        padded = self._padded(noise)
        log_prob = self.proposal.noise_log_prob(padded, self.proposal.transform(padded))
        return noise, log_density - log_prob[: self.num_images]

    def _padded(self, part: Tensor) -> Tensor:
        missing = len(self.images) - len(part)
        return F.pad(part, (0, 0, 0, 0, 0, missing)) if missing else part
