"""The exceptions that end a run deliberately, each with its exit code.

A message says what happened, in which file or key, and what to do. Wrong calls of the library raise plain
`ValueError`s; these classes are for problems of a run's configuration, data or machine.
"""

from __future__ import annotations

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class SeppoError(Exception):
    """Base class; the command line prints the message without a traceback and exits with `exit_code`."""

    exit_code: int = 1


class ConfigError(SeppoError):
    """An unknown key, a value out of range, or a model or file named in the configuration that cannot be used."""

    exit_code = 2


class DataError(SeppoError):
    """The data is missing, unreadable or empty, too many examples are bad, or no space is left for the cache."""

    exit_code = 3


class OutOfMemoryError(SeppoError):
    """The run does not fit into memory."""

    exit_code = 4


class NonFiniteError(SeppoError):
    """A loss, a gradient or an encoder's output is non-finite, or no update of a run changed the weights."""

    exit_code = 5


class CheckpointError(SeppoError):
    """A saved state, a checkpoint, weights or the output folder cannot be read or written."""

    exit_code = 6


class LostProcessError(SeppoError):
    """Another process of the run has exited or does not respond."""

    exit_code = 7
