"""What a decoded token may cost on the mlx backend: how often the host waits for the device, and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm", reason="the mlx backend's models are mlx-lm's")

from mlx_lm.generate import generation_stream  # noqa: E402

import mlx_flash  # noqa: E402
from mlx_flash.engine.backends.base import BLOCK  # noqa: E402
from mlx_flash.engine.backends.mlx.backend import MlxBackend, MlxPass  # noqa: E402
from mlx_flash.engine.residency.slot_loader import LAZY_STEPS  # noqa: E402
from mlx_flash.models.mlx.flash_modules import FlashFFNModule  # noqa: E402
from mlx_flash.models.text.sampling import Sampling  # noqa: E402
from tests.calibrated import make_calibrated, selectors  # noqa: E402
from tests.engine.backends.test_mlx_backend import BACKEND, COUNT, DIM, DTYPES, Net, bits, make_net, make_x  # noqa: E402
from tests.tiny import three_budgets  # noqa: E402

PROMPT = [256, 5, 9, 33, 2, 17, 60, 8, 21]
READS = ("item", "tolist", "__array__", "__int__", "__float__", "__bool__", "__index__")
WARM = 4  # tokens until views are made, slots are filled and the step ahead is under way


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calibrated("openelm-relu", tmp_path_factory.mktemp("limits"))


def load(path: Path, select: str, memory: int) -> Any:
    return mlx_flash.load(path, backend="mlx", memory=memory, select=select, look_ahead="off")[0]


class Watch:
    """Counts per token what happens inside the FFNs: ("read" | "eval" | "async_eval" | "late settle", layer)."""

    def __init__(self, patch: pytest.MonkeyPatch, layers: int):
        self.layers, self.token, self.layer, self.calls = layers, 0, None, 0
        self.settling = False
        self.tokens: list[Counter] = [Counter()]
        self.outside: Counter = Counter()
        for name in ("eval", "async_eval"):
            patch.setattr(mx, name, self.counting(getattr(mx, name), name))
        for name in READS:
            patch.setattr(mx.array, name, self.counting(getattr(mx.array, name), "read"), raising=False)
        for name in ("array", "asarray"):
            patch.setattr(np, name, self.converting(getattr(np, name)))
        patch.setattr(FlashFFNModule, "__call__", self.inside(FlashFFNModule.__call__))
        patch.setattr(MlxPass, "settle", self.settle(MlxPass.settle))
        begin = MlxBackend.ffn
        patch.setattr(MlxBackend, "ffn", lambda *given: self.born(begin(*given)))

    def count(self, what: str) -> None:
        if self.layer is None:
            self.outside[what] += 1
        elif not self.settling:
            self.tokens[-1][what, self.layer] += 1

    def counting(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def counted(*args: Any, **named: Any) -> Any:
            self.count(what)
            return function(*args, **named)

        return counted

    def converting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(value: Any, *args: Any, **named: Any) -> Any:
            if isinstance(value, mx.array):
                self.count("read")
            return function(value, *args, **named)

        return counted

    def inside(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(module: Any, x: Any) -> Any:
            self.layer = self.calls % self.layers
            if self.layer == 0:
                self.tokens.append(Counter())
            self.calls += 1
            try:
                return call(module, x)
            finally:
                self.layer = None

        return counted

    def born(self, work: Any) -> Any:
        work.born = len(self.tokens)
        return work

    def settle(self, settle: Callable[..., Any]) -> Callable[..., Any]:
        """To settle a step that lies LAZY_STEPS behind waits for nothing: its token has been given since."""

        def counted(work: Any) -> None:
            if len(self.tokens) - work.born < LAZY_STEPS:
                self.count("late settle")
            self.settling = True
            settle(work)
            self.settling = False

        return counted


def watched(path: Path, select: str, memory: int, tokens: int = 12) -> tuple[list[Counter], Counter]:
    """What each decoded token did, once warm, and what was done outside of the FFNs."""
    model = load(path, select, memory)
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch, len(model.layers))
        assert len(list(model.flash.steps(model, PROMPT, tokens, Sampling()))) == tokens
        patch.undo()
    model.flash.close()
    return watch.tokens[-(tokens - WARM) :], watch.outside


def test_the_watch_sees_every_way_of_reading() -> None:
    ways: list[Callable[[Any], Any]] = [lambda a: np.array(a), lambda a: np.asarray(a), lambda a: a.item(), int, float]
    ways += [lambda a: a.tolist(), bool, lambda a: mx.eval(a), lambda a: mx.async_eval(a)]
    for way in ways:
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch, 1)
            way(mx.array(3))
            patch.undo()
        assert watch.outside.total() >= 1, way


@pytest.mark.parametrize("select", ["all", "prompt:1"])
def test_nothing_is_waited_for_where_the_selector_needs_no_answer(path: Path, select: str) -> None:
    everything = three_budgets(path, "mlx", select)[-1]
    inside, outside = watched(path, select, everything)
    assert inside == [Counter()] * len(inside)
    assert outside["read"] == 12  # the sampled tokens


@pytest.mark.parametrize("select", ["all", "prompt:0.5"])
def test_a_step_that_reads_nothing_is_begun_before_the_last_token_is_given(path: Path, select: str) -> None:
    begun = []
    for memory in three_budgets(path, "mlx", select)[::2]:
        model = load(path, select, memory)
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch, len(model.layers))
            begun.append([watch.calls // watch.layers for _ in model.flash.steps(model, PROMPT, 6, Sampling())])
        model.flash.close()
    in_turn, ahead = begun
    # The first token is not kept waiting for what the first step may read, and nothing comes after the last one.
    assert ahead == [in_turn[0], *(count + 1 for count in in_turn[1:-1]), in_turn[-1]]


@pytest.mark.parametrize("select", ["prompt:0.3", "static:0.4"])
def test_a_selection_that_stays_is_never_read_back(path: Path, select: str) -> None:
    inside, _ = watched(path, select, three_budgets(path, "mlx", select)[-1])
    assert not any(what in ("read", "eval", "late settle") for token in inside for what, _ in token)


@pytest.mark.parametrize("select", ["gate", "threshold:0.5", "predictor"])
def test_a_selector_that_needs_an_answer_reads_once_per_layer(path: Path, select: str) -> None:
    inside, _ = watched(path, select, three_budgets(path, "mlx", select)[-1])
    for token in inside:
        for layer in range(3):
            assert token["read", layer] == 1
            assert token["eval", layer] <= 1  # the same wait: what is read, and what must be done by then
            assert token["late settle", layer] == 0


@pytest.mark.parametrize("select", ["all", "gate", "prompt:0.5"])
def test_active_memory_does_not_grow_over_200_tokens(path: Path, select: str) -> None:
    for memory in three_budgets(path, "mlx", select)[1:]:
        model = load(path, select, memory)
        layers = list(selectors(model))
        largest = layers[-1].spec.layout.count * sum(part.nbytes for part in layers[-1].spec.layout.parts)
        levels = []
        for number, _ in enumerate(model.flash.steps(model, PROMPT, 200, Sampling())):
            mx.synchronize(generation_stream)  # the step ahead is done: what is alive now stays
            levels.append(mx.get_active_memory())
            if number == 20:
                mx.reset_peak_memory()
        model.flash.close()
        # 8 KiB: the last steps' scalars are held, and each token fires others; 180 slabs' copies would be 50 MB.
        assert max(levels[20:]) <= max(levels[5:20]) + 8192
        # Copies of selected rows, of which there are at most half, or a block's scalars and sums.
        temporary = mx.get_peak_memory() - max(levels[20:])
        assert temporary < (largest // 8 if select == "all" else largest)


def selected(net: Net, x: Any, ids: np.ndarray, rows: np.ndarray, size: int) -> bytes:
    """What `ids` give that lie in `rows` of a slab of `size` rows, of which the others are rubbish."""
    slab = BACKEND.slab(net.spec.layout, size, net.names)
    for target in slab.targets:
        target.rows[:] = 0xFF  # NaN in every dtype
    net.fill(slab, net.names, ids, rows)
    work = BACKEND.ffn(net.spec, x)
    work.scalars(ids, slab, rows)
    work.down()
    return bits(work.result())


@pytest.mark.parametrize("activation", ["silu", "relu", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_follow_each_other_are_used_where_they_lie_to_the_same_bits(
    dtype: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make_net(dtype, "relu" if activation == "plain" else activation, activation != "plain")
    x, _ = make_x(1, dtype)
    rng = np.random.default_rng(5)
    copied: list[Any] = []
    take = mx.take
    monkeypatch.setattr(
        mx,
        "take",
        lambda a, *rest, **named: copied.append(a.shape[-1] if a.ndim == 2 else 0) or take(a, *rest, **named),
    )
    for count in (1, 40, 64, 100, 256, 300, 600):
        ids = np.sort(rng.permutation(COUNT)[:count]).astype(np.int32)
        wanted = selected(net, x, ids, np.sort(rng.permutation(4 * COUNT)[:count]), 4 * COUNT)
        assert DIM in copied or count == 1  # scattered rows are gathered
        assert selected(net, x, ids, rng.permutation(count + 20)[:count], count + 20) == wanted
        for first, spare in ((0, 0), (0, 64), (7, 0), (70, 3), (64, 64)):
            copied.clear()
            got = selected(net, x, ids, first + np.arange(count), first + count + spare)
            assert got == wanted, (count, first, spare)
            assert DIM not in copied or first + count + spare < 64


def test_of_the_copies_of_many_rows_two_pieces_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_flash.engine.backends.mlx.backend.PIECE", BLOCK)
    net = make_net("float32", count=32 * BLOCK)
    x, _ = make_x(1)
    ids = np.arange(0, 32 * BLOCK, 2)
    slab = net.slab(net.names, ids, 2 * ids, 64 * BLOCK)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    work = BACKEND.ffn(net.spec, x)
    work.scalars(ids, slab, 2 * ids)
    work.down()
    mx.eval(work.result())
    piece = BLOCK * sum(part.nbytes for part in net.spec.layout.parts)
    assert mx.get_peak_memory() - before < 2 * piece + 4 * DIM * 16 + 64 * len(ids)
