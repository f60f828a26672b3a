"""Selectors after a failed read: no stale rows, and the logits of a fresh model."""

from __future__ import annotations

from typing import Any

import pytest

import mlx_flash
from mlx_flash.engine.storage.readers import FaultyReader
from mlx_flash.tools.inspection import inspect_model
from tests.calibrated import check_slots, selectors
from tests.runtime.lossy_models import (
    Models,
    reply,
)
from tests.runtime.plans import load_split


@pytest.mark.parametrize(
    ("kind", "select", "fields"),
    [
        ("relu", "predictor", {"look_ahead": "off"}),
        ("relu", "predictor", {"look_ahead": "on"}),
        ("relu", "gate", {"look_ahead": "on"}),
        ("silu", "prompt:0.4", {"reselect": 2}),
        ("silu-up", "threshold:0.5", {}),
    ],
)
def test_after_every_failed_read_the_model_is_as_good_as_new(
    models: Models,
    backend: str,
    kind: str,
    select: str,
    fields: dict[str, Any],
) -> None:
    path = models(kind)
    counts = inspect_model(path, mlx_flash.FlashConfig(backend=backend))["bundles"]
    capacities = tuple(int(0.6 * count) for count in counts)
    fail_at = failed = 0
    guesses = fields.get("look_ahead") == "on"  # the last layer's are for no token
    model = load_split(path, capacities, 2, backend=backend, select=select, **fields)
    try:
        wanted = reply(model, 5, 3)
        reader = model.flash.shared.reader
        while True:
            fail_at += 1 if backend == "numpy" else 3
            for selector in selectors(model):  # every run makes the same reads
                selector.residency.reset()
                selector.loaded = False
            faulty = model.flash.shared.reader = FaultyReader(reader, fail_at)
            try:
                got = reply(model, 5, 3)
                assert faulty.submits < fail_at or guesses, f"read {fail_at} failed unnoticed"
                assert (got == wanted).all(), f"read {fail_at} failed unnoticed, and the logits are others"
            except mlx_flash.ReadError:
                failed += 1
            model.flash.shared.reader = reader
            check_after_fault(model)
            assert (reply(model, 5, 3) == wanted).all(), f"after read {fail_at} failed the logits are others"
            check_slots(model)
            if faulty.submits < fail_at:
                break
    finally:
        model.flash.close()
    assert failed > 3, "the run made almost no reads: this tested nothing"


def check_after_fault(model: Any) -> None:
    """What the next call will take for granted: the layer that was cut short has forgotten its slots by then."""
    unfinished = model.flash.shared.unfinished
    model.flash.shared.begin(unfinished or next(selectors(model)))
    model.flash.shared.end()
    check_slots(model)
    if unfinished is not None:
        assert unfinished.residency.num_used == 0
