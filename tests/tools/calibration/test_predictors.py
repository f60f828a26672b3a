"""Predictors: they find planted neurons, reach the recall on held-out tokens, and stay within the budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlx_flash.engine.numerics.casting import from_float32, to_float32
from mlx_flash.errors import UsageError
from mlx_flash.tools.calibration.predictor_fit import LEAST_STEPS, TrainingData
from mlx_flash.tools.calibration.predictors import (
    PRICES,
    PriceCurve,
    choose_price,
    choose_ranks,
    default_ranks,
    predictor_bytes,
    sketch_layer,
    train_layer,
    train_predictor,
)

DIM, COUNT, PLANTED, TOKENS = 32, 64, 4, 6000


class Planted:
    """Inputs with unlike variances and a mean; who fires is decided by PLANTED directions and a threshold each."""

    def __init__(self, seed: int = 1, shift: float = 1.2):
        rng = np.random.default_rng(seed)
        mix = rng.standard_normal((DIM, DIM)) * np.geomspace(3, 0.1, DIM)
        self.mean = rng.standard_normal(DIM)
        self.sample = lambda n: (rng.standard_normal((n, DIM)) @ mix.T + self.mean).astype(np.float32)
        directions = rng.standard_normal((PLANTED, DIM)) / 6
        self.gate = (rng.standard_normal((COUNT, PLANTED)) @ directions).astype(np.float32)
        spread = np.sqrt(((self.gate @ mix) ** 2).sum(axis=1))
        self.offset = (-self.gate @ self.mean - shift * spread).astype(np.float32)
        self.x = self.sample(TOKENS)

    def fires(self, x: np.ndarray) -> np.ndarray:
        return x @ self.gate.T + self.offset > 0


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


def test_planted_directions_are_found(planted):
    predictor, report = train_predictor(planted.x, planted.fires, rank=PLANTED)
    fresh = planted.sample(4000)
    firing, asked = planted.fires(fresh), predictor.scores(fresh) > 0
    assert predictor.a.shape == (PLANTED, DIM) and predictor.b.shape == (COUNT, PLANTED)
    assert (firing & asked).sum() / firing.sum() >= 0.97
    assert asked.mean() < 1.35 * firing.mean()
    assert abs(report.firing - firing.mean()) < 0.01


def test_a_matrix_of_gates_is_as_good_as_a_callable():
    made = Planted(shift=0.0)
    x = made.x - made.mean  # a gate has no offset of its own
    by_matrix = train_layer(x, made.gate, rank=3, epochs=1)
    by_callable = train_layer(x, lambda block: block @ made.gate.T > 0, rank=3, epochs=1)
    np.testing.assert_array_equal(by_matrix.curve.asked, by_callable.curve.asked)
    assert by_matrix.curve.rate.min() > 0.3


def test_too_small_a_rank_pays_with_requests_not_with_recall(planted):
    _, narrow = train_predictor(planted.x, planted.fires, rank=2)
    _, wide = train_predictor(planted.x, planted.fires, rank=PLANTED)
    assert min(narrow.recall, wide.recall) >= 0.97
    assert narrow.predicted > 1.3 * wide.predicted


def test_the_start_at_full_rank_is_each_neurons_discriminant(planted):
    data = TrainingData(planted.x, planted.fires, None)
    rest = np.arange(3, COUNT)
    rate = (data.fired[rest] / len(data.inputs)).astype(np.float32)
    a, b = data.start(rest, rate, DIM)
    white = (planted.x[: len(data.inputs)] - data.mean) @ data.whiten.T
    firing = planted.fires(planted.x[: len(data.inputs)])[:, rest]
    between = np.stack([white[f].mean(axis=0) - white[~f].mean(axis=0) for f in firing.T])
    np.testing.assert_allclose(b @ a, between, atol=2e-3)


def test_training_beats_its_starting_point(planted):
    trained = train_layer(planted.x, planted.fires, rank=2)
    start = train_layer(planted.x, planted.fires, rank=2, epochs=0)  # the least steps there are
    none = np.zeros(COUNT, bool)
    assert choose_price([trained], [none])[0][1].predicted <= 1.02 * choose_price([start], [none])[0][1].predicted


def test_a_price_means_odds(planted):
    trained, fresh = train_layer(planted.x, planted.fires, rank=2, epochs=30), planted.sample(20000)
    firing = planted.fires(fresh)
    assert trained.weight == pytest.approx(firing.mean() / (1 - firing.mean()), rel=0.05)  # the classes are balanced
    for price in (2, 10):
        k = int(np.abs(np.log(PRICES / price)).argmin())
        predictor, _ = trained.at(k, np.zeros(COUNT, bool))
        near = np.abs(predictor.scores(fresh)) < 0.2  # where one is just about worth asking for
        odds = firing[near].mean() / (1 - firing[near].mean())
        assert 0.7 / PRICES[k] < odds < 1.4 / PRICES[k]


def test_recall_target_is_obeyed(planted):
    trained, none = train_layer(planted.x, planted.fires, rank=2), np.zeros(COUNT, bool)
    reports = [choose_price([trained], [none], recall)[0][1] for recall in (0.5, 0.8, 0.9, 0.99)]
    for recall, report in zip((0.5, 0.8, 0.9, 0.99), reports, strict=True):
        assert recall <= report.recall < recall + 0.1
    assert sorted(report.predicted for report in reports) == [report.predicted for report in reports]


def test_report_is_what_the_rounded_predictor_does_on_the_tail(planted):
    for dtype in ("int8", "bfloat16"):
        predictor, report = train_predictor(planted.x, planted.fires, rank=3, dtype=dtype)
        tail = planted.x[-report.tokens :]
        firing, asked = planted.fires(tail), predictor.scores(tail) > 0
        assert report.tokens == int(0.15 * TOKENS)
        assert report.recall == pytest.approx((firing & asked).sum() / firing.sum(), abs=1e-3)
        assert report.precision == pytest.approx((firing & asked).sum() / asked.sum(), abs=1e-3)
        assert report.predicted == pytest.approx(asked.mean(), abs=1e-3)


def test_the_tail_is_not_learnt_from(planted):
    spoilt = planted.x.copy()
    spoilt[-int(0.15 * TOKENS) :] = 0
    clean, other = (train_layer(x, planted.fires, rank=3, epochs=1).predictor for x in (planted.x, spoilt))
    np.testing.assert_array_equal(clean.a, other.a)
    np.testing.assert_array_equal(clean.bias, other.bias)


def test_weights_fit_their_dtype(planted):
    whole = train_layer(planted.x, planted.fires, rank=3, dtype="int8", epochs=1).predictor
    step = np.abs(whole.b[whole.b != 0]).min()
    step = 2.0 ** np.floor(np.log2(step)) if step else 1.0
    while not (np.rint(whole.b / step) == whole.b / step).all():
        step /= 2
    for items in (whole.a, whole.b / step):
        assert (np.rint(items) == items).all() and np.abs(items).max() <= 127
    assert np.abs(whole.a).max() == 127 and np.abs(whole.b / step).max() >= 63  # no bit is given away
    half = train_layer(planted.x, planted.fires, rank=3, dtype="bfloat16", epochs=1).predictor
    for items in (half.a, half.b):
        np.testing.assert_array_equal(to_float32(from_float32(items, "bfloat16"), "bfloat16"), items)
    with pytest.raises(UsageError, match="int4"):
        train_layer(planted.x, planted.fires, rank=3, dtype="int4")


def test_same_seed_same_bits_another_seed_not(planted):
    first, again, other = (
        train_layer(planted.x, planted.fires, rank=3, seed=seed, epochs=1).predictor for seed in (5, 5, 6)
    )
    for name in ("a", "b", "bias"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.bias, other.bias)


def test_half_precision_inputs_from_a_file(planted, tmp_path):
    path = tmp_path / "inputs.npy"
    np.save(path, planted.x.astype(np.float16))
    predictor, report = train_predictor(np.load(path, mmap_mode="r"), planted.fires, rank=PLANTED)
    assert predictor.a.dtype == np.float32 and report.recall >= 0.97 and report.predicted < 1.35 * report.firing


def test_neurons_that_never_or_always_fire(planted):
    def fires(x: np.ndarray) -> np.ndarray:
        firing = planted.fires(x)
        firing[:, 0], firing[:, 1] = False, True
        return firing

    predictor, report = train_predictor(planted.x, fires, rank=PLANTED)
    asked = predictor.scores(planted.sample(1000)) > 0
    assert not asked[:, 0].any() and asked[:, 1].all() and report.recall >= 0.97


def test_a_layer_where_all_fire_or_none():
    x = Planted().x
    predictor, report = train_predictor(x, lambda block: np.ones((len(block), COUNT), bool), rank=2)
    assert (predictor.scores(x[:100]) > 0).all() and (report.recall, report.precision, report.firing) == (1, 1, 1)
    predictor, report = train_predictor(x, lambda block: np.zeros((len(block), COUNT), bool), rank=2)
    assert not (predictor.scores(x[:100]) > 0).any() and (report.recall, report.predicted) == (1, 0)


def test_inputs_that_never_vary():
    x = np.ones((2000, DIM), np.float32)
    predictor, report = train_predictor(
        x, np.linspace(-1, 1, COUNT * DIM, dtype=np.float32).reshape(COUNT, DIM), rank=2
    )
    assert np.isfinite(predictor.scores(x[:1])).all() and report.recall == 1 and report.precision == 1


def test_neurons_left_out_are_always_on(planted):
    left_out = np.arange(COUNT) < 10
    trained = train_layer(planted.x, planted.fires, rank=PLANTED, always=left_out)
    [(predictor, report)] = choose_price([trained], [left_out])
    np.testing.assert_array_equal(predictor.always, left_out)
    assert (predictor.scores(planted.sample(50))[:, :10] > 0).all() and not predictor.b[:10].any()
    assert report.always == left_out.mean() and report.recall >= 0.97


def test_rank_0_asks_for_everything(planted):
    predictor, report = train_predictor(planted.x, planted.fires, rank=0)
    assert predictor.a.shape == (0, DIM) and predictor.b.shape == (COUNT, 0) and predictor.always.all()
    assert (predictor.scores(planted.x[:3]) > 0).all() and (report.recall, report.predicted) == (1, 1)
    cheapest, _ = train_layer(planted.x, planted.fires, rank=0).at(len(PRICES) - 1, np.zeros(COUNT, bool))
    assert cheapest.always.all()


@pytest.mark.parametrize("x", [np.zeros((1023, DIM), np.float32), np.zeros((0, DIM), np.float32)])
def test_too_few_tokens_are_refused(x):
    with pytest.raises(UsageError, match=f"at least 1024 tokens, got {len(x)}"):
        train_predictor(x, np.ones((COUNT, DIM), np.float32), rank=2)


def test_impossible_ranks_and_broken_inputs_are_refused(planted):
    for rank in (-1, DIM + 1):
        with pytest.raises(UsageError, match=f"rank {rank} "):
            train_predictor(planted.x, planted.fires, rank=rank)
    broken = planted.x.copy()
    broken[7, 3] = np.nan
    with pytest.raises(UsageError, match="not numbers"):
        train_predictor(broken, planted.fires, rank=2)


def test_progress_ends_at_the_end(planted):
    seen: list[tuple[int, int]] = []
    train_layer(planted.x, planted.fires, rank=2, epochs=1, progress=lambda done, steps: seen.append((done, steps)))
    assert seen[-1] == (LEAST_STEPS, LEAST_STEPS) and [done for done, _ in seen] == sorted({done for done, _ in seen})
    seen.clear()
    sketch_layer(planted.x, planted.fires, [2, 4], epochs=1, progress=lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# Ranks


def made_curve(rank: int, asked: float, count: int = 100) -> PriceCurve:
    """A curve that loses nothing and asks for the same at every price."""
    return PriceCurve(
        rank, 1000, *(np.full((len(PRICES), count), share) for share in (asked, 0.0)), np.full(count, 0.1)
    )


def choose(sketches, budget_bytes=10**9, always_share=0.0, **more):
    return choose_ranks(sketches, 50, budget_bytes=budget_bytes, always_share=always_share, **more)


def test_rank_stops_where_doubling_saves_less_than_5_percent():
    for asked, rank in (
        ([0.5, 0.3, 0.295, 0.29], 8),
        ([0.5, 0.4, 0.3, 0.2], 32),
        ([0.5, 0.49, 0.45, 0.44], 16),  # 16 saves more than 5 % for each of two doublings
        ([0.5, 0.49, 0.48, 0.47], 4),
        ([0.97, 0.97, 0.97, 0.96], 0),
    ):
        assert choose([[made_curve(0, 1.0), *map(made_curve, (4, 8, 16, 32), asked)]]).ranks == (rank,)


def test_budget_goes_where_it_saves_most():
    good, poor = (list(map(made_curve, (0, 4, 8), asked)) for asked in ([1.0, 0.3, 0.25], [1.0, 0.8, 0.7]))
    size = {rank: predictor_bytes(rank, 50, 100, "int8") for rank in (0, 4, 8)}
    for budget, ranks in (
        (2 * size[0], (0, 0)),
        (size[0] + size[4], (4, 0)),
        (size[4] + size[8] - 1, (4, 4)),
        (size[4] + size[8], (4, 8)),
        (2 * size[8], (8, 8)),
    ):
        choice = choose([good, poor], budget)
        assert choice.ranks == ranks
        assert choice.nbytes == sum(size[rank] for rank in ranks) <= budget
    with pytest.raises(UsageError, match="the budget for all of them is 799"):
        choose([good, poor], 799)


def test_hot_neurons_are_always_on_within_their_share():
    hot = made_curve(4, 0.2)
    hot.asked[:, :7] = 0.9
    sketches = [[made_curve(0, 1.0), hot], [made_curve(0, 1.0), made_curve(4, 0.05)]]
    for share, counts in ((0.0, [0, 0]), (0.034, [0, 0]), (0.035, [7, 0]), (0.1, [7, 0]), (0.6, [100, 0])):
        choice = choose(sketches, always_share=share)
        assert [int(on.sum()) for on in choice.always] == counts, share
        if share == 0.1:
            np.testing.assert_array_equal(np.flatnonzero(choice.always[0]), np.arange(7))
            assert choice.ranks == (4, 4) and choice.requests == pytest.approx(93 * 0.2 + 100 * 0.05)
    assert choice.ranks == (0, 4)  # no neuron of the first layer is left to predict


def test_recall_is_that_of_the_whole_model(planted):
    easy = train_layer(planted.x, planted.fires, rank=PLANTED)
    hard = train_layer(planted.x, planted.fires, rank=1)
    none = np.zeros(COUNT, bool)
    (_, first), (_, second) = choose_price([easy, hard], [none, none], 0.9)
    assert 0.9 <= (first.recall + second.recall) / 2 < 0.93
    assert first.recall > second.recall + 0.02  # what is cheap to find makes up for what is dear


def test_unreachable_recall_asks_for_everything(planted):
    trained = train_layer(planted.x, planted.fires, rank=1, epochs=1)
    hopeless = replace(trained, curve=replace(trained.curve, lost=0 * trained.curve.lost + trained.curve.rate))
    [(predictor, report)] = choose_price([hopeless], [np.zeros(COUNT, bool)])
    assert predictor.always.all() and (predictor.bias == 1).all() and report.recall == 1


def test_sketch_train_and_settle_together(planted):
    other = Planted(seed=2)
    layers = [(made.x, made.fires) for made in (planted, other)]
    sketches = [sketch_layer(x, fires, [2, 4, 8], epochs=1) for x, fires in layers]
    assert [[curve.rank for curve in curves] for curves in sketches] == [[0, 2, 4, 8]] * 2
    budget = sum(predictor_bytes(4, DIM, COUNT, "int8") for _ in layers)
    choice = choose_ranks(sketches, DIM, budget_bytes=budget)
    assert choice.ranks == (4, 4) and choice.nbytes <= budget and choice.recall >= 0.97
    trained = [
        train_layer(x, fires, rank=rank, always=on)
        for (x, fires), rank, on in zip(layers, choice.ranks, choice.always, strict=True)
    ]
    for (predictor, report), on in zip(choose_price(trained, choice.always), choice.always, strict=True):
        assert report.recall >= 0.95 and report.predicted < 0.23 + 2 * report.firing
        np.testing.assert_array_equal(predictor.always, on)


def test_default_ranks_cost_less_than_the_gate():
    assert default_ranks(256, 1024) == [16, 32, 48, 64, 96, 128]
    assert default_ranks(3072, 12288) == [128, 192, 256, 384, 512]
    for dim, count in ((8, 16), (16, 8), (64, 64), (256, 256)):
        assert all(
            0 < rank <= min(dim, count) and rank * (dim + count) <= dim * count for rank in default_ranks(dim, count)
        )
