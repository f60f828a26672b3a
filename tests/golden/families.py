"""All families of the golden grid."""

from __future__ import annotations

from .cells import GridFamily
from .dense import DENSE
from .mixtures import MIXTURES

FAMILIES: dict[str, GridFamily] = DENSE | MIXTURES
