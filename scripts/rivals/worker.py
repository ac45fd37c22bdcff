"""How ``scripts/bench.py`` talks with a rival that lives in an environment of its own.

A rival is a process that stays alive, so that rounds can take turns and nothing is compiled twice.
It reads lines of JSON from standard input and answers each by a line on standard output:

1. ``{"images": PATH, "batch_size", "hidden", "latent_dim", "device", "clock"}``; ``images`` is a
   ``.npy`` of bits ``[N, P]``, uint8. Answer: ``{"versions": {...}}``.
2. Any number of times ``{"bound": "elbo" or "iwae", "num_samples": K, "seconds": S}``: train for
   about S seconds. Answer: ``{"images": trained on, "seconds": taken}``. The first time of each
   bound also compiles; it is not counted.

It ends when its input does. Needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}

Measure = Callable[[float], tuple[int, float]]
"""Train for about so many seconds; how many images that were, and the seconds taken."""


def serve(
    versions: dict[str, str], prepare: Callable[[dict[str, Any]], Callable[[str, int], Measure]]
) -> None:
    """Answer until the input ends.

    Args:
        versions: of the rival's packages.
        prepare: takes the settings and returns a function that sets up the training of a bound
            with K samples.
    """
    # What the rival prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    training_of = prepare(json.loads(sys.stdin.readline()))
    answer({"versions": versions})
    measures: dict[tuple[str, int], Measure] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = request["bound"], request["num_samples"]
        if key not in measures:
            measures[key] = training_of(*key)
        images, seconds = measures[key](request["seconds"])
        answer({"images": images, "seconds": seconds})
