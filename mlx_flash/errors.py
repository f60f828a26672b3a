"""Every error that a user can cause, with the exit status of the command line.

FlashError                1
+-- UsageError            2   wrong arguments, an empty or too long prompt
|   +-- BudgetError       2   the memory budget is too small or unreadable
|   +-- ConfigError       2   config.json lacks a key, or names an unknown family or activation
|   +-- FormatError       2   a file that contradicts its header or config: truncated, oversized, another version
+-- ReadError             1   the disk failed, or a file ended, while reading
+-- IntegrityError        1   `verify` found a file that has changed
+-- SpaceError            1   not enough room on the disk
+-- BackendError          2   the backend asked for is not installed or cannot run here
"""

from __future__ import annotations


class FlashError(Exception):
    """Base of all errors; `exit_status` is what the command exits with."""

    exit_status = 1


class UsageError(FlashError):
    """A wrong argument or prompt."""

    exit_status = 2


class BudgetError(UsageError):
    """The memory budget is too small or cannot be read."""


class ConfigError(UsageError):
    """A config lacks a key, or names a family or activation that is not known."""


class FormatError(UsageError):
    """A checkpoint file is truncated, oversized, of another version, or contradicts its header."""


class BackendError(UsageError):
    """The backend asked for is not installed, or cannot run this model."""


class ReadError(FlashError):
    """A read failed or hit the end of the file; the message names file, layer and bundle."""


class IntegrityError(FlashError):
    """A file's hash is not the one recorded when it was written."""


class SpaceError(FlashError):
    """Not enough free disk space."""
