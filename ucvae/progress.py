"""What is shown of a computation while it goes on."""

from __future__ import annotations

import os
import sys


def quiet() -> bool:
    """Say whether only warnings are shown: ``UCVAE_QUIET`` is set, as for jobs side by side."""
    return bool(os.environ.get("UCVAE_QUIET"))


def hidden() -> bool:
    """Say whether there are no progress bars: as above, or the error output is no terminal."""
    return quiet() or not sys.stderr.isatty()
