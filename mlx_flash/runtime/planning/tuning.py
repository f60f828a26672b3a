"""How bundles are read: the settings of the reads, and where each of them comes from.

What suits a measured machine is chosen in tuning_choice.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_flash.config import FlashConfig
from mlx_flash.engine.storage.aio_reader import DEPTH
from mlx_flash.engine.storage.read_plan import Merging

from .selective_persistence import STAGING_BLOCKS

DEFAULT, GIVEN = "default", "given"
OVER = 1.0  # gaps that pay may be as many bytes as are asked for


@dataclass(frozen=True)
class Tuning:
    """How bundles are read.

    merge_gap: in bytes; reads_in_flight: None leaves it to the reader; staging_blocks: the most, as the budget may have
    room for fewer; look_ahead: "auto" (measures whether it pays), "on" or "off"
    why: where each field comes from: "default", "given", or what was measured
    """

    merge_gap: int = Merging().gap
    reads_in_flight: int | None = None
    direct: bool = True
    staging_blocks: int = STAGING_BLOCKS
    look_ahead: str = "auto"
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def merging(self) -> Merging:
        """For the reader. A gap that was measured or given may add as many bytes as are asked for."""
        default = self.why.get("merge_gap", DEFAULT) == DEFAULT
        return Merging(self.merge_gap) if default else Merging(self.merge_gap, OVER)

    @property
    def reader_options(self) -> dict[str, Any]:
        """For `open_reader`."""
        depth = {} if self.reads_in_flight is None else {"depth": self.reads_in_flight}
        return {"direct": self.direct, "merging": self.merging, **depth}

    @property
    def depth(self) -> int:
        """Reads in flight, also where that is left to the reader."""
        return DEPTH if self.reads_in_flight is None else self.reads_in_flight

    def report(self) -> dict[str, dict[str, Any]]:
        """Every field's value and where it comes from."""
        names = ("merge_gap", "reads_in_flight", "direct", "staging_blocks", "look_ahead")
        return {name: {"value": getattr(self, name), "why": self.why.get(name, DEFAULT)} for name in names}


def given_settings(config: FlashConfig) -> dict[str, Any]:
    """The settings of the reads that the user chose, by Tuning's names."""
    names = ("merge_gap", "reads_in_flight", "staging_blocks", "look_ahead")
    found = {name: getattr(config, name) for name in names if getattr(config, name) != "auto"}
    return found if config.direct == "auto" else found | {"direct": config.direct == "on"}


def default_tuning(given: Mapping[str, Any]) -> Tuning:
    """The settings where nothing was measured: the defaults, and those given."""
    return replace(Tuning(), **given, why={name: GIVEN for name in given})
