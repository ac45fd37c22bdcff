"""What every test starts from: torch's global seed fixed, one thread."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """For the fixtures of modules too: the order of a sum may depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reproducible(one_thread):
    torch.manual_seed(0)


@pytest.fixture
def double():
    """Float64 as torch's default dtype, for the duration of a test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
