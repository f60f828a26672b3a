"""One-line notices on stderr: what takes a while, and what a model's config holds that is not understood."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from mlx_flash.models.specs.key_checks import unknown_keys, unknown_keys_text

from .model_code import ModelCode


def announce(message: str) -> None:
    """Print a line on stderr at once."""
    print(message, file=sys.stderr, flush=True)


def report_keys(models: ModelCode, config: Mapping[str, Any]) -> None:
    """Name the keys of a model's config that the backend's model code does not read."""
    unknown = unknown_keys(config, models.keys_read(config))
    if unknown:
        announce(unknown_keys_text(unknown))
