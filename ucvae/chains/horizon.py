r"""How far pairs of chains that do not meet may go: a cap, or Russian roulette.

A cap on t drops the later terms of Eq 14's second sum, and so biases. Russian roulette (Kahn 1956;
as a debiasing device McLeish 2011, Rhee and Glynn 2015) leaves most of them out, too, but by chance
and at known odds. The pairs that have not met at ``t = m`` go on with probability q each, and again
at ``t = 2m, 4m, 8m, ...``; a term beyond j such games weighs ``q^-j`` times as much. It is there
with probability ``q^j``, independently of its value, so that its expectation is what it was.

A pair then makes at most

    m (1 + q + 2 q^2 + 4 q^3 + ...) = m (1 + q / (1 - 2q))

steps in expectation however late it would meet, that is 3 m at q = 0.4: finite for q < 1/2. In
return a term of t > m weighs up to ``(t/m)^r / q``, r = log2(1/q), which is 1.3 at q = 0.4. As that
is a power of t, the variance stays finite for every q > 0 where meeting times have geometric tails.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Horizon:
    """Where the pairs of a call stand before the next game.

    Attributes:
        end: no step beyond this t before it.
        weight: of the terms up to there.
        survival: q; with 0 the first end is a cap.
    """

    def __init__(self, max_steps: int, survival: float) -> None:
        self.end = max_steps
        self.weight = 1.0
        self.survival = survival

    def survivors(self, image_index: Tensor, generator: torch.Generator) -> Tensor:
        """Which of these images ``[n]`` go on, ``[n]``; moves the end. A cap draws nothing."""
        if not self.survival:
            return torch.zeros_like(image_index, dtype=torch.bool)
        self.end *= 2
        self.weight /= self.survival
        device = image_index.device
        uniform = torch.rand(
            len(image_index), generator=generator, device=device, dtype=torch.float64
        )
        return uniform < self.survival
