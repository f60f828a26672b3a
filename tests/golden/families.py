"""All families of the golden grid."""

from __future__ import annotations

from . import without_transformers
from .cells import GridFamily
from .dense import DENSE
from .mixtures import MIXTURES

FAMILIES: dict[str, GridFamily] = DENSE | MIXTURES | without_transformers.FAMILIES
