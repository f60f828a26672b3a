"""The mlx backend on its own: memory that is written through, and sums that do not depend on where rows lie."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core")

from mlx_flash.engine.backends.base import BLOCK, FFNSpec, Widths  # noqa: E402
from mlx_flash.engine.backends.mlx.backend import LAZY_BYTES, MlxBackend, MlxPass, available  # noqa: E402
from mlx_flash.engine.backends.mlx.slab import PAGE, MlxSlab  # noqa: E402
from mlx_flash.engine.storage.bundle import Layout, Part  # noqa: E402
from mlx_flash.errors import ConfigError  # noqa: E402

DIM, COUNT = 96, 4 * BLOCK + 40
BACKEND = MlxBackend()
DTYPES = ("float32", "bfloat16", "float16")
# 16-bit: h and each block's sum are rounded; measured 0.07 % (float16) and 0.5 % (bfloat16) of the largest output.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}


def to_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """values (n, d) as rows of bytes (n, d * item)."""
    if dtype == "bfloat16":
        values = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values.astype(dtype) if dtype != "bfloat16" else values).view(np.uint8)


def from_bytes(rows: np.ndarray, dtype: str) -> np.ndarray:
    """The same values as float64."""
    if dtype == "bfloat16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return rows.view(dtype).astype(np.float64)


@dataclass
class Net:
    """One FFN: its spec, its bundles as bytes, its values as float64."""

    spec: FFNSpec
    data: dict[str, np.ndarray]
    up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    gate_bias: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.spec.layout.parts]

    def value(self, name: str) -> np.ndarray:
        return from_bytes(self.data[name], self.spec.layout.parts[0].dtype)

    def fill(self, slab: MlxSlab, names: list[str], ids: np.ndarray, rows: np.ndarray) -> None:
        for name, target in zip(names, slab.targets, strict=True):
            target.rows[rows] = self.data[name][ids]

    def slab(self, names: list[str], ids: np.ndarray, rows: np.ndarray, size: int) -> MlxSlab:
        slab = BACKEND.slab(self.spec.layout, size, names)
        self.fill(slab, names, ids, rows)
        return slab

    def reference(self, x: np.ndarray) -> np.ndarray:
        """x (T, d) -> (T, d), float64."""
        act = (lambda v: np.maximum(v, 0)) if self.spec.activation == "relu" else (lambda v: v / (1 + np.exp(-v)))
        if self.spec.gated:
            gate = x @ self.value("gate").T + (0 if self.gate_bias is None else self.gate_bias)
            hidden = act(gate) * (x @ self.value("up").T + (0 if self.up_bias is None else self.up_bias))
        else:
            hidden = act(x @ self.value("up").T + (0 if self.up_bias is None else self.up_bias))
        return hidden @ self.value("down") + (0 if self.down_bias is None else self.down_bias)


def make_net(dtype: str = "float32", activation: str = "silu", gated: bool = True, count: int = COUNT) -> Net:
    rng = np.random.default_rng(7)
    names = ("gate", "up", "down") if gated else ("up", "down")
    layout = Layout(tuple(Part(name, dtype, DIM) for name in names), count)
    data = {name: to_bytes(rng.standard_normal((count, DIM)) * DIM**-0.5, dtype) for name in names}
    if gated:
        return Net(FFNSpec(layout, activation, True), data)
    up, down = rng.standard_normal(count).astype(np.float32), rng.standard_normal(DIM).astype(np.float32)
    return Net(FFNSpec(layout, activation, False, mx.array(up), mx.array(down)), data, up, down)


def make_biased(dtype: str, activation: str) -> Net:
    """A gated one with biases of all three parts."""
    net, rng = make_net(dtype, activation), np.random.default_rng(8)
    found = {
        name: rng.standard_normal(size).astype(np.float32)
        for name, size in (("gate_bias", COUNT), ("up_bias", COUNT), ("down_bias", DIM))
    }
    return Net(replace(net.spec, **{name: mx.array(bias) for name, bias in found.items()}), net.data, **found)


def make_x(tokens: int, dtype: str = "float32") -> tuple[mx.array, np.ndarray]:
    x = np.random.default_rng(tokens).standard_normal((tokens, DIM))
    rows = to_bytes(x, dtype)
    array = mx.array(from_bytes(rows, dtype).astype(np.float32)).astype(getattr(mx, dtype))
    return array.reshape(1, tokens, DIM), from_bytes(rows, dtype)


def bits(y: mx.array) -> bytes:
    return np.array(y.astype(mx.float32)).tobytes()


def assert_close(y: mx.array, wanted: np.ndarray, dtype: str) -> None:
    got = np.array(y.astype(mx.float32)).reshape(wanted.shape)
    assert np.abs(got - wanted).max() <= TOLERANCE[dtype] * np.abs(wanted).max()


def run_dense(net: Net, x: mx.array, resident: int, staging: int = BLOCK) -> mx.array:
    """Ids under `resident` from one slab, the rest through one staging slab of `staging` rows, used again and again."""
    ids = np.arange(net.spec.layout.count)
    work = BACKEND.ffn(net.spec, x)
    if resident:
        work.dense(net.slab(net.names, ids[:resident], ids[:resident], resident), 0, 0, resident)
    slab = BACKEND.slab(net.spec.layout, staging, net.names)
    for first in range(resident, len(ids), staging):
        some = ids[first : first + staging]
        net.fill(slab, net.names, some, some - first)
        work.dense(slab, 0, first, len(some))
        work.settle()
    return work.result()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_a_slab_is_zeroed_memory_of_the_stated_size(dtype: str, rows: int) -> None:
    layout = make_net(dtype).spec.layout
    before = mx.get_active_memory()
    slab = BACKEND.slab(layout, rows, ["up", "down"])
    grown = mx.get_active_memory() - before
    assert slab.rows == rows and slab.nbytes == BACKEND.slab_bytes(layout, rows, ["up", "down"])
    assert slab.nbytes - 2 * PAGE < max(grown, 1) <= slab.nbytes + 64  # 64: the zero that it is filled from
    assert [target.offset for target in slab.targets] == [layout.offset("up"), layout.offset("down")]
    for target, part in zip(slab.targets, ("up", "down"), strict=True):
        assert target.rows.shape == (rows, layout.part(part).nbytes) and target.rows.dtype == np.uint8
        assert not target.rows.any()
        assert slab.parts[part].dtype == getattr(mx, dtype) and slab.parts[part].shape == (rows, DIM)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_through_the_view_is_seen_and_never_copied(dtype: str) -> None:
    net = make_net(dtype, "relu")
    ids = np.arange(COUNT)
    rng = np.random.default_rng(1)
    slab, gates = net.slab(net.names, ids, ids, COUNT), net.slab(["gate"], ids, ids, COUNT)
    addresses = [target.rows.ctypes.data for target in slab.targets]
    x, values = make_x(1, dtype)
    levels = []
    for step in range(200):
        net.data["down"] = to_bytes(rng.standard_normal((COUNT, DIM)) * DIM**-0.5, dtype)
        slab.targets[2].rows[:] = net.data["down"]
        work = BACKEND.ffn(net.spec, x)
        if step % 2:
            fired = work.gate(gates)
            work.scalars(fired, slab, fired)
            work.down()
        else:
            work.dense(slab, 0, 0, COUNT)
            work.settle()  # the same rows are overwritten in the next turn
        mx.eval(y := work.result())
        if step % 20 < 2:
            assert_close(y, net.reference(values), dtype)
        del work, y
        mx.synchronize()
        levels.append(mx.get_active_memory())
    assert max(levels[100:]) <= max(levels[4:20]) + slab.nbytes // 100
    assert addresses == [np.frombuffer(slab.parts[name], np.uint8).ctypes.data for name in net.names]


def test_a_products_operands_are_the_slab_itself() -> None:
    net = make_net("bfloat16", count=16 * BLOCK)
    ids = np.arange(16 * BLOCK)
    slab, (x, _) = net.slab(net.names, ids, ids, len(ids)), make_x(1, "float32")
    mx.eval(run := BACKEND.ffn(net.spec, x).result())  # float32 input on a bfloat16 slab: x is cast, not the slab
    assert run.dtype == mx.float32
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    work = BACKEND.ffn(net.spec, x)
    work.dense(slab, 0, 0, len(ids))
    mx.eval(work.result())
    assert mx.get_peak_memory() - before < slab.nbytes // 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("relu", True), ("relu", False), ("silu", False)])
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_dense_is_the_ffn_and_any_split_gives_the_same_bits(
    dtype: str, activation: str, gated: bool, tokens: int
) -> None:
    net = make_net(dtype, activation, gated)
    x, values = make_x(tokens, dtype)
    whole = run_dense(net, x, COUNT)
    assert whole.shape == x.shape and whole.dtype == x.dtype
    assert_close(whole, net.reference(values), dtype)
    for resident, staging in ((0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 3 * BLOCK), (0, 2 * BLOCK), (4 * BLOCK, BLOCK)):
        assert bits(run_dense(net, x, resident, staging)) == bits(whole), (resident, staging)


@pytest.mark.parametrize("tokens", [1, 2])
def test_blocks_are_summed_in_fp32(tokens: int) -> None:
    """Blocks of 256, 1, 1, 1 and 1: in bfloat16 256 + 1 is 256."""
    names = ("gate", "up", "down")
    layout = Layout(tuple(Part(name, "bfloat16", DIM) for name in names), 5 * BLOCK)
    values = {name: np.zeros((5 * BLOCK, DIM), np.float32) for name in names}
    values["gate"][:, 0] = values["up"][:, 0] = 1
    values["down"][::BLOCK, 0] = [256, 1, 1, 1, 1]
    net = Net(FFNSpec(layout, "relu", True), {name: to_bytes(rows, "bfloat16") for name, rows in values.items()})
    x = mx.zeros((1, tokens, DIM), mx.bfloat16)
    x[..., 0] = 1
    assert run_dense(net, x, 5 * BLOCK)[..., 0].tolist() == [[260.0] * tokens]


def run_selected(net: Net, x: mx.array, seed: int, share: float, cuts: list[int]) -> tuple[bytes, np.ndarray]:
    """The gate path, as a selector runs it: a random part of the selected ids in random slots, the rest in staging
    rows that are overwritten after each round; rounds are cut at the block borders `cuts`."""
    rng = np.random.default_rng(seed)
    ids = np.arange(COUNT)
    first, rest = net.names[0], net.names[1:]
    work = BACKEND.ffn(net.spec, x)
    selected = work.gate(net.slab([first], ids, ids, COUNT))
    assert selected.dtype == np.int32
    resident = np.sort(rng.choice(selected, int(share * len(selected)), replace=False))
    slots = rng.permutation(COUNT)[: len(resident)]
    slab = net.slab(rest, resident, slots, COUNT)
    staging = BACKEND.slab(net.spec.layout, COUNT, rest)
    where = dict(zip(resident.tolist(), slots.tolist(), strict=True))
    borders = [0, *[cut * BLOCK for cut in cuts], COUNT]
    for low, high in zip(borders, borders[1:], strict=False):
        chosen = selected[(selected >= low) & (selected < high)]
        hits = np.array([i for i in chosen if i in where], np.int32)
        misses = np.array([i for i in chosen if i not in where], np.int32)
        rng.shuffle(hits)
        half = len(hits) // 2
        work.scalars(hits[:half], slab, np.array([where[i] for i in hits[:half].tolist()], int))
        rows = rng.permutation(COUNT)[: len(misses)]
        net.fill(staging, rest, misses, rows)
        work.scalars(misses, staging, rows)
        work.scalars(hits[half:], slab, np.array([where[i] for i in hits[half:].tolist()], int))
        work.down()
        work.settle()
        for target in staging.targets:
            target.rows[:] = 0xFF  # NaN in every dtype
    return bits(work.result()), selected


NETS = {(d, g): make_net(d, "relu", g) for d in DTYPES for g in (True, False)}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 999),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    cuts=st.sets(st.integers(1, 4)).map(sorted),
    tokens=st.sampled_from([1, 1, 3]),
)
def test_where_selected_rows_lie_does_not_change_a_bit(
    dtype: str, gated: bool, seed: int, share: float, cuts: list[int], tokens: int
) -> None:
    net = NETS[dtype, gated]
    x, values = make_x(tokens, dtype)
    plain, selected = run_selected(net, x, 0, 1.0, [])
    got, _ = run_selected(net, x, seed, share, cuts)
    assert got == plain
    assert_close(mx.array(np.frombuffer(got, np.float32)).reshape(tokens, DIM), net.reference(values), dtype)
    fires = (values @ net.value(net.names[0]).T + (0 if net.up_bias is None else net.up_bias) > 0).any(axis=0)
    assert np.array_equal(selected, np.flatnonzero(fires)) or dtype != "float32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_selected_rows_are_copied_piece_by_piece_to_the_same_bits(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, (x, _) = NETS[dtype, True], make_x(1, dtype)
    whole, selected = run_selected(net, x, 0, 0.9, [])
    assert len(selected) > 400  # of which run_selected gives 0.45 to `scalars` at once
    taken = []
    take = mx.take
    monkeypatch.setattr(mx, "take", lambda a, *rest, **named: taken.append(r := take(a, *rest, **named)) or r)
    monkeypatch.setattr("mlx_flash.engine.backends.mlx.backend.PIECE", 192)
    assert run_selected(net, x, 0, 0.9, [])[0] == whole
    assert max(len(rows) for rows in taken if rows.shape[-1] == DIM) <= 192


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_biases_of_a_gated_ffn(tokens: int, activation: str) -> None:
    net = make_biased("float32", activation)
    x, values = make_x(tokens)
    assert_close(run_dense(net, x, COUNT // BLOCK * BLOCK), net.reference(values), "float32")
    ids = np.random.default_rng(1).permutation(COUNT)
    for lead in ("gate", "up"):
        led = Net(replace(net.spec, lead=lead), net.data, net.up_bias, net.down_bias, net.gate_bias)
        work = BACKEND.ffn(led.spec, x)
        work.scalars(ids, led.slab(led.names, ids, np.arange(COUNT), COUNT), np.arange(COUNT))
        work.down()
        assert_close(work.result(), net.reference(values), "float32")
    if activation == "relu":
        got, selected = run_selected(net, x, 3, 0.5, [1])
        assert_close(mx.array(np.frombuffer(got, np.float32)).reshape(tokens, DIM), net.reference(values), "float32")
        gates = values @ net.value("gate").T + net.gate_bias
        assert np.array_equal(selected, np.flatnonzero((gates > 0).any(axis=0)))


def test_gate_names_an_id_that_fires_for_any_token_and_none_when_nothing_does() -> None:
    net = make_net("float32", "relu")
    ids = np.arange(COUNT)
    gates = net.slab(["gate"], ids, ids, COUNT)
    x, values = make_x(3)
    fires = (values @ net.value("gate").T) > 0
    assert BACKEND.ffn(net.spec, x).gate(gates).tolist() == np.flatnonzero(fires.any(axis=0)).tolist()
    work = BACKEND.ffn(net.spec, mx.zeros((2, 1, DIM)))
    assert work.gate(gates).tolist() == []
    work.scalars(np.array([], np.int32), BACKEND.slab(net.spec.layout, 0, ["up", "down"]), np.array([], np.int32))
    work.down()
    assert work.result().tolist() == [[[0.0] * DIM]] * 2


def test_slots_may_be_rewritten_after_the_layers_next_gate() -> None:
    """Nobody evaluates the first output before the slots change: tokens that the caller already knew."""
    net = make_net("float32", "relu")
    ids = np.arange(COUNT)
    gates, slab = net.slab(["gate"], ids, ids, COUNT), net.slab(["up", "down"], ids, ids, COUNT)
    x, values = make_x(1)

    def run() -> mx.array:
        work = BACKEND.ffn(net.spec, x)
        fired = work.gate(gates)
        work.scalars(fired, slab, fired)
        work.down()
        return work.result()

    first = run()
    BACKEND.ffn(net.spec, x).gate(gates)
    for target in slab.targets:
        target.rows[:] = 0xFF
    assert_close(first, net.reference(values), "float32")


def test_prefill_waits_before_its_temporaries_pile_up() -> None:
    count, tokens = 64 * BLOCK, 512
    layout = Layout(tuple(Part(name, "float32", DIM) for name in ("gate", "up", "down")), count)
    slab = BACKEND.slab(layout, count, ["gate", "up", "down"])
    x = mx.ones((1, tokens, DIM))
    mx.eval(x)
    stated = BACKEND.prefill_scratch_bytes(layout, Widths(DIM, count, 3 * DIM, DIM, 1), tokens, tokens)
    mx.reset_peak_memory()
    before, settled = mx.get_active_memory(), []
    work = BACKEND.ffn(FFNSpec(layout, "silu", True), x)
    settle = work.settle
    work.settle = lambda: settled.append(settle())  # type: ignore[method-assign]
    work.dense(slab, 0, 0, count)
    mx.eval(work.result())
    assert len(settled) == 64 * (tokens * (3 * BLOCK * 4 + DIM * 12)) // LAZY_BYTES
    assert mx.get_peak_memory() - before < stated < slab.nbytes * 4


def test_misuse_is_refused() -> None:
    net = make_net()
    x, _ = make_x(1)
    with pytest.raises(ConfigError, match="tanh.*silu, relu"):
        BACKEND.ffn(FFNSpec(net.spec.layout, "tanh", True), x)
    slab = BACKEND.slab(net.spec.layout, 2 * BLOCK, net.names)
    work: MlxPass = BACKEND.ffn(net.spec, x)
    work.dense(slab, 0, BLOCK, BLOCK)
    with pytest.raises(ValueError, match="ascending"):
        work.dense(slab, 0, 0, BLOCK)


def test_available_says_whether_there_is_a_gpu() -> None:
    assert available() == (mx.default_device() == mx.gpu)
