"""Statistics of neurons, against the plainest loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.tools.calibration import neuron_statistics
from mlx_flash.tools.calibration.neuron_statistics import SPARSITIES, FfnWeights


def test_statistics_are_those_of_plain_loops() -> None:
    rng = np.random.default_rng(0)
    tokens, dim, count = 40, 6, 21
    x = rng.normal(size=(tokens, dim)).astype(np.float16)
    gate, up, down = rng.normal(size=(3, count, dim)).astype(np.float32)
    wide = x.astype(np.float64)
    for activation in ("relu", "silu"):
        weights = FfnWeights(gate, up, down, None, activation)
        g, u = wide @ gate.T.astype(np.float64), wide @ up.T.astype(np.float64)
        a = np.maximum(g, 0) if activation == "relu" else g / (1 + np.exp(-g))
        h = a * u
        outputs = h**2 * (down.astype(np.float64) ** 2).sum(axis=1)
        found = neuron_statistics.sample_statistics(x, weights)
        np.testing.assert_allclose(neuron_statistics.energy(x, weights), outputs.mean(axis=0), rtol=1e-4)
        later = [t for t in range(tokens) if t not in (0, 17)]
        np.testing.assert_allclose(
            neuron_statistics.energy(x, weights, [0, 17]), outputs[later].mean(axis=0), rtol=1e-4
        )
        for name, lead in (("gate", np.abs(a)), ("up", np.abs(u))):
            np.testing.assert_allclose(found.cutoffs[name], np.quantile(lead, SPARSITIES), rtol=1e-3, atol=1e-6)
            cut = np.quantile(lead, 0.5)
            assert found.lost[name] == pytest.approx(outputs[lead <= cut].sum() / outputs.sum(), rel=1e-3, abs=1e-9)
        needed = []
        for token in h**2:
            ordered, total, n = np.sort(token)[::-1], 0.0, 0
            while total < 0.99 * token.sum():
                total, n = total + ordered[n], n + 1
            needed.append(n / count)
        assert found.neurons_for_99_percent == pytest.approx(np.mean(needed), abs=1e-6)

    fires = wide @ gate.T > 0
    packed = neuron_statistics.firing(x, FfnWeights(gate, up, down, None, "relu"))
    assert (np.unpackbits(packed, axis=1)[:, :count] == fires).all()
    np.testing.assert_allclose(neuron_statistics.rates(packed, count), fires.mean(axis=0), rtol=1e-6)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 30), st.floats(0, 1), st.integers(0, 99))
def test_gaps_and_curves_are_those_of_plain_loops(tokens: int, count: int, density: float, seed: int) -> None:
    fires = np.random.default_rng(seed).random((tokens, count)) < density
    histogram = np.zeros(tokens + 1, int)
    for neuron in range(count):
        used = np.flatnonzero(fires[:, neuron])
        for before, after in zip(used, used[1:], strict=False):
            histogram[after - before] += 1
    packed = np.packbits(fires, axis=1)
    assert (neuron_statistics.gaps(packed, count) == histogram).all()
    curve = neuron_statistics.miss_curve(histogram)
    windows = [0] + [1 << k for k in range(20) if 1 << k < tokens and (2 << k) <= tokens]
    for row, k in enumerate(windows):
        # A use's bundle is held for k tokens, or until its next use takes over; of the last uses nothing is known.
        held = missed = 0
        for neuron in range(count):
            used = np.flatnonzero(fires[:, neuron])
            for before, after in zip(used, used[1:], strict=False):
                held += min(k, after - before)
                missed += after - before > k
        np.testing.assert_allclose(curve[row], [held / tokens, missed / tokens], rtol=1e-6)
    assert len(curve) == len(windows)


def test_a_layer_in_which_nothing_fires_has_figures_too() -> None:
    dead = FfnWeights(
        np.ones((5, 4), np.float32), np.ones((5, 4), np.float32), np.ones((5, 4), np.float32), None, "relu"
    )
    with np.errstate(all="raise"):
        found = neuron_statistics.sample_statistics(-np.ones((300, 4), np.float16), dead)
        energy = neuron_statistics.energy(-np.ones((300, 4), np.float16), dead)
    assert not energy.any() and found.neurons_for_99_percent <= 1
    assert all(np.isfinite(value) for value in found.lost.values())


def test_bias_and_cutoff_decide_what_fires() -> None:
    x = np.array([[1.0], [2.0], [3.0]], np.float16)
    ones = np.ones((1, 1), np.float32)
    fatrelu = FfnWeights(ones, ones, ones, None, "relu", cutoff=2.0)
    assert np.unpackbits(neuron_statistics.firing(x, fatrelu), axis=1)[:, 0].tolist() == [0, 0, 1]
    biased = FfnWeights(ones, None, ones, np.array([-1.5], np.float32), "relu")
    assert np.unpackbits(neuron_statistics.firing(x, biased), axis=1)[:, 0].tolist() == [0, 1, 1]
    assert (x @ ones.T + fatrelu.offset > 0).ravel().tolist() == [False, False, True]
    assert (x @ ones.T + biased.offset > 0).ravel().tolist() == [False, True, True]
