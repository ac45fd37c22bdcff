"""The optimizers step as their formulas say, by the gradients as they are: nothing is clipped."""

import pytest
import torch
from torch import nn

from ucvae.optimizers import Adam, RMSProp, Schedule

pytestmark = pytest.mark.usefixtures("double")

# With a step 10^6 times the one before it: a step alone would hide a clipping, as both formulas
# divide by the gradient's size.
GRADIENTS = torch.tensor([[1.0, -2.0], [1e6, 3.0], [-4.0, 5.0]], dtype=torch.float64)


def steps(optimizer):
    parameter = nn.Parameter(torch.zeros(2))
    built = optimizer.build([parameter])
    for gradient in GRADIENTS:
        parameter.grad = gradient.clone()
        built.step()
        yield parameter.detach().clone()


def test_rmsprop():
    square, value = torch.zeros(2), torch.zeros(2)
    found = steps(RMSProp(lr=0.1, decay=0.9, eps=1e-3))
    for gradient, after in zip(GRADIENTS, found, strict=True):
        square = 0.9 * square + 0.1 * gradient**2
        value = value - 0.1 * gradient / (square.sqrt() + 1e-3)
        torch.testing.assert_close(after, value)


def test_adam():
    mean, square, value = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    found = steps(Adam(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3))
    for t, (gradient, after) in enumerate(zip(GRADIENTS, found, strict=True), start=1):
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        size = (square / (1 - 0.9**t)).sqrt() + 1e-3
        value = value - 0.1 * mean / (1 - 0.8**t) / size
        torch.testing.assert_close(after, value)


def test_a_constant_rate():
    assert RMSProp(lr=0.5).learning_rate(10_000) == 0.5


def test_burdas_schedule():
    """``10^(-i/7)`` for ``3^i`` epochs, i = 0..7: 3,280 in all."""
    expected = [0.5 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert len(expected) == 3280
    optimizer = Adam(lr=0.5, schedule=Schedule.burda)
    assert [optimizer.learning_rate(epoch) for epoch in range(3280)] == pytest.approx(expected)
    assert optimizer.learning_rate(10_000) == pytest.approx(0.05)


@pytest.mark.parametrize("kind", [Adam, RMSProp])
def test_steps_are_torchs_own(kind):
    settings = {"milestones": [2, 3, 7], "gamma": 0.2}
    ours = kind(lr=0.5, schedule=Schedule.steps, **settings)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, **settings)
    for epoch in range(10):
        assert ours.learning_rate(epoch) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_gamma_is_for_milestones():
    assert RMSProp().without_effect() == {"gamma": "schedule=constant"}
    assert Adam(schedule=Schedule.burda).without_effect() == {"gamma": "schedule=burda"}
    assert RMSProp(schedule=Schedule.steps, milestones=[3]).without_effect() == {}
