"""A request that is too large for the machine: one line, and nothing lost."""

import re

import pytest
import torch

from faults import runs
from ucvae import checkpoint
from ucvae.device import within_memory
from ucvae.errors import OutOfMemoryError

# So many numbers of 4 bytes take more than any machine gives out.
HUGE = 10**12
LINE = re.compile(r"ucvae-\w+: error: out of memory \(tried to allocate \d+ bytes\); .*\n")


def test_a_model_too_large(server, tmp_path):
    server.start(tmp_path, *runs.SHORT, f"model.hidden=[{HUGE}]", "hydra.run.dir=a")
    code, output = server.end()
    assert code == 1 and LINE.fullmatch(output)
    assert not (tmp_path / "a").exists()


def test_a_step_too_large(server, tmp_path):
    asked = (*runs.SHORT[3:], "estimator=iwae", f"estimator.num_samples={HUGE}")
    server.start(tmp_path, *asked, "hydra.run.dir=a")
    code, output = server.end()
    assert code == 1 and LINE.fullmatch(output)
    assert checkpoint.last(tmp_path / "a").exists()  # of before the first step


def test_an_evaluation_too_large(finished, command, tmp_path):
    asked = ("study=ais_gap", f"study.chains={HUGE}", "hydra.run.dir=b", "device=cpu")
    ended = command("ucvae-eval", f"run={finished}", *asked)
    assert ended.code == 1 and LINE.fullmatch(ended.err)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904]"),
    ],
)
def test_what_devices_say(error):
    asked = " (tried to allocate 2.00 GiB)" if "GiB" in str(error) else ""
    with pytest.raises(OutOfMemoryError, match=re.escape(f"out of memory{asked}; ")):
        with within_memory():
            raise error


def test_another_error_is_none_of_memory():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), within_memory():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 3x4)")
