r"""The chains' estimate against the exact gradient of a linear-Gaussian model's log-likelihood.

One image is repeated R = 20,000 times as a batch; each replicate gives an estimate of the gradient
in the decoder's 12 numbers. How :func:`references.is_unbiased` decides: 50 batch means of 400, a t
statistic of 49 degrees of freedom a component, a false alarm once in 10^6 runs for all 12 together.
So it rejects beyond t = 6.3, that is a bias of about 6.3 / sqrt(20,000) = 0.045 standard deviations
of the estimate; IWAE's and the other controls' are larger, and must be rejected.
"""

import pytest
import torch
from references import LinearGaussian, integrate, is_unbiased

from ucvae.chains import isir, moves, run_lagged_chains

pytestmark = pytest.mark.usefixtures("double")

REPLICATES = 20_000
TOY = LinearGaussian()
IMAGE = TOY.images[1]


def run(seed=3, **settings):
    generator = torch.Generator().manual_seed(seed)
    return run_lagged_chains(
        TOY.log_weight(IMAGE), REPLICATES, 2, generator=generator, dtype=torch.float64, **settings
    )


def estimates(particles):
    values = TOY.joint_gradient(IMAGE, TOY.transform(IMAGE, particles.noise))
    return integrate(particles, REPLICATES, values)


def iwae(num_samples):
    noise = torch.randn(REPLICATES, num_samples, 2)
    log_weights = TOY.log_weight(IMAGE)(noise, torch.zeros(REPLICATES, dtype=torch.long))
    values = TOY.joint_gradient(IMAGE, TOY.transform(IMAGE, noise))
    return (torch.softmax(log_weights, -1)[:, :, None] * values).sum(1)


@pytest.mark.parametrize(
    "kernel, num_samples, lag, burn_in",
    [
        ("isir", 2, 1, 0),
        ("isir", 4, 1, 1),
        ("isir", 3, 3, 0),
        ("isir", 3, 2, 3),
        ("isir", 8, 1, 1),
        ("isir_disir", 2, 1, 0),
        ("isir_disir", 4, 1, 1),
        ("isir_disir", 3, 3, 0),
        ("isir_disir", 3, 2, 3),
        ("isir_disir", 10, 10, 1),
    ],
)
def test_coupled_chains_are_unbiased_where_iwae_is_not(kernel, num_samples, lag, burn_in):
    chains = run(kernel=kernel, num_samples=num_samples, lag=lag, burn_in=burn_in, beta=0.7)
    truth = TOY.gradient(IMAGE)
    assert not chains.truncated.any()
    assert is_unbiased(estimates(chains.particles), truth)
    assert not is_unbiased(iwae(num_samples), truth)


class TestControls:
    """Wrong estimators: the test function has to reject each."""

    def test_without_the_correction_at_isir_s_meeting_step(self, monkeypatch):
        # In that step, the last before tau, the chains' samples differ in the incumbents (trap 2).
        correct = isir._Ledger.correct

        def up_to_the_meeting(ledger, walked, weight):
            after = torch.cat([walked.apart[1:], walked.end_apart[None]])
            meeting = (walked.apart & ~after)[:, None]
            # Two chains with Y's incumbent correct nothing.
            of_y = [torch.where(meeting, part[:, 1:], part) for part in walked.incumbents]
            log_sum = torch.where(meeting, walked.log_sum[:, 1:], walked.log_sum)
            of_y = isir.Chains(*of_y)
            correct(ledger, walked._replace(incumbents=of_y, log_sum=log_sum), weight)

        settings = dict(kernel="isir", num_samples=8, lag=1, burn_in=1)
        whole = run(**settings).particles
        monkeypatch.setattr(isir._Ledger, "correct", up_to_the_meeting)
        kept = run(**settings).particles
        assert torch.equal(whole.noise, kept.noise)
        assert is_unbiased(estimates(whole), TOY.gradient(IMAGE))
        total = integrate(kept, REPLICATES, torch.ones(*kept.coefficient.shape, 1))
        torch.testing.assert_close(total, torch.ones_like(total))  # the sum 1 does not tell
        assert not is_unbiased(estimates(kept), TOY.gradient(IMAGE))

    @pytest.mark.parametrize("kernel", ["isir", "isir_disir"])
    def test_without_any_correction(self, kernel):
        main = run(kernel=kernel, num_samples=3, lag=1, burn_in=1).main
        assert not is_unbiased(estimates(main), TOY.gradient(IMAGE))

    @pytest.mark.parametrize("kernel", ["isir", "isir_disir"])
    def test_without_the_images_that_run_to_a_cap(self, kernel):
        chains = run(kernel=kernel, num_samples=3, lag=1, burn_in=1, max_steps=2)
        met = ~chains.truncated
        assert 0 < met.sum() < REPLICATES
        assert not is_unbiased(estimates(chains.particles)[met], TOY.gradient(IMAGE))

    def test_with_beta_adapted_within_the_call(self, monkeypatch):
        # X's steps alone had another beta than Y's first steps, of the same t (trap 3).
        step, early = moves.step, moves.Arms.of(torch.tensor(0.05), 3)
        monkeypatch.setattr(moves, "step", lambda *args: step(*args[:-1], args[-1] and early))
        particles = run(num_samples=3, lag=1, burn_in=1, beta=0.95).particles
        assert not is_unbiased(estimates(particles), TOY.gradient(IMAGE))
