"""MLX's modes without biases: the values of their codes and scales, and every scale against MLX's own numbers."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_flash.engine.numerics.microscaling import E2M1, E4M3, E8M0, widen
from mlx_flash.engine.storage.bundle import SCALE_ONLY_MODES


def test_the_values_of_small_floats() -> None:
    halves = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert E2M1.tolist() == halves + [-value for value in halves]
    assert E4M3[[0x01, 0x08, 0x38, 0x3C, 0x7E, 0xFE]].tolist() == [2**-9, 2**-6, 1, 1.5, 448, -448]
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all() and np.isfinite(np.delete(E4M3, [0x7F, 0xFF])).all()
    assert E8M0[[0, 126, 127, 128, 254]].tolist() == [2.0**-127, 0.5, 1, 2, 2.0**127]


def test_codes_by_hand() -> None:
    words = np.array([[0x76543210, 0xFEDCBA98] * 2], np.uint32)  # every code of four bits, twice
    wide = widen(words, np.array([[128]], np.uint8), "mxfp4")
    assert wide.shape == (1, 32) and wide[0].tolist() == (2 * E2M1).tolist() * 2
    wide = widen(words, np.array([[0x38, 0x3C]], np.uint8), "nvfp4")
    assert wide[0].tolist() == E2M1.tolist() + (1.5 * E2M1).tolist()
    assert widen(words, np.array([[127]], np.uint8), "mxfp8").shape == (1, 16)


@pytest.mark.parametrize("mode", SCALE_ONLY_MODES)
def test_every_scale_is_mlx_s(mode: str) -> None:
    mx = pytest.importorskip("mlx.core")
    bits, size = SCALE_ONLY_MODES[mode]
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << 32, (256, 4 * size * bits // 32), np.uint32)
    scales = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 4))
    wanted = mx.dequantize(mx.array(codes), mx.array(scales), None, size, bits, mode=mode, dtype=mx.float32)
    np.testing.assert_array_equal(widen(codes, scales, mode), np.array(wanted))
