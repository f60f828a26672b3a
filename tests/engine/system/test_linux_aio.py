"""Which systems have Linux's asynchronous I/O. What it reads is tested with the reader."""

from __future__ import annotations

import pytest

from mlx_flash.engine.system.linux_aio import LinuxAio


@pytest.mark.parametrize("wrong", [{"machine": "riscv64"}, {"system": "darwin"}, {"system": "win32"}])
def test_other_systems_have_none(wrong: dict[str, str]) -> None:
    with pytest.raises(OSError, match="no asynchronous I/O"):
        LinuxAio(**wrong)
