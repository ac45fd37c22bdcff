"""Beta settled by the rule of training."""

from types import SimpleNamespace

import pytest
import torch

from ucvae.estimators.coupled import Coupled
from ucvae.studies.base import BETA_SETTLED, settle_beta


def settle(ess_of, beta=0.1):
    """Settle beta with chains whose effective sample size is a known function of it."""
    coupled, calls = Coupled(beta=beta), []

    def chains():
        calls.append(float(coupled.current_beta))
        return SimpleNamespace(ess=torch.tensor(ess_of(calls[-1])))

    value = settle_beta(coupled, chains)
    assert float(coupled.current_beta) == value
    return value, len(calls)


def test_it_settles_where_the_rule_stands_still():
    # 0.3 K = 3 at beta = 0.5. A call moves beta by a 25th of the distance, so that 50 calls leave
    # 0.13 of it: where two means of 50 differ by less than 0.01 the second is nearly there.
    value, calls = settle(lambda beta: 1 + 4 * beta)
    assert value == pytest.approx(0.5, abs=BETA_SETTLED)
    assert 100 <= calls <= 300
    # One that is there already is looked at twice: its start may be there by chance.
    assert settle(lambda beta: 1 + 4 * beta, beta=0.5) == (pytest.approx(0.5), 100)


def test_it_ends_where_the_rule_has_no_rest():
    # 0.01 a call, to one end and back for ever; beta must stay in its range all the same.
    value, calls = settle(lambda beta: 2 if beta < 0.5 else 4)
    assert 0 < value < 1 and calls <= 1000
    value, _ = settle(lambda beta: 1.0)
    assert value == pytest.approx(1, abs=BETA_SETTLED)
