"""What every test starts from: torch's global seed fixed, one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def double():
    """Float64 as torch's default dtype, for the duration of a test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
