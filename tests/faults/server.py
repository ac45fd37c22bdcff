"""Runs ``ucvae-train`` again and again, each time in a fresh fork of a process that has imported.

For each line of JSON on the standard input, ``[folder, output, arguments]``, it writes the child's
process id, and when the child has ended its exit code (negative: the signal that killed it).
"""

import json
import os
import sys

import torch

import ucvae.data.digits
import ucvae.training  # noqa: F401
from ucvae.cli import train


def child(folder, output, arguments):
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["ucvae-train", *arguments]
    code = train.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                child(*request)
            finally:
                os._exit(99)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
