"""Errors that a user can cause, each told in one line that names the input and what is allowed.

The command line prints them as they are, without a traceback; everything else is a defect of
ours and keeps its traceback.
"""


class UcvaeError(Exception):
    """Base of all errors that the command line prints as one line.

    Attributes:
        told: it has been printed already, by this process or by another of the same run.
    """

    told = False


class ConfigError(UcvaeError):
    """A configuration key that is unknown, or a value of the wrong type or range."""


class DataError(UcvaeError):
    """A data file that is missing, damaged, or not what its name says; splits of a wrong kind."""


class RunError(UcvaeError):
    """A run folder or checkpoint that cannot be read or written, or does not fit the request."""


class NonFiniteError(UcvaeError):
    """A quantity of the computation that became infinite or NaN; named, never skipped."""


class LostProcessError(UcvaeError):
    """Another process of the run has ended before its time."""


class OutOfMemoryError(UcvaeError):
    """What was asked for is larger than the memory of the device, or of the machine."""
