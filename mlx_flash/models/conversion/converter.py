"""`convert`: a Hugging Face checkpoint becomes a flash checkpoint. FFN neurons become bundles, the rest is copied.

One thread reads, another transposes and writes, through a few buffers that are used again; at most a panel of one
layer's down projection is in memory. Where a family keeps its tensors is said in specs/families.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.engine.numerics.casting import RAW, cast, check_dtype
from mlx_flash.engine.storage.bundle import ITEM_BYTES, Layout, layer_file, layer_header
from mlx_flash.engine.storage.calibration import SHIPPED, file_name, model_identity, read_calibration
from mlx_flash.engine.storage.writer import FolderWriter, HashedFile, check_free_space, remove_stale
from mlx_flash.errors import FormatError, UsageError
from mlx_flash.models.specs.folder import safe_file
from mlx_flash.models.specs.model_spec import TensorRef
from mlx_flash.models.specs.source import READ_ALIGN, Source, find_folder, read_buffer, safetensors_header
from mlx_flash.models.text.tokenizer import TOKENIZERS

from .neuron_groups import Dequantised, GroupPipeline
from .plan import ConversionPlan, Settings, make_plan
from .quantising import Matrix, check_options

BLOCK_BYTES = 8 << 20  # one write, one hash update, one read of each part
BLOCKS = 4  # buffers between the reading and the writing thread
PANEL_BYTES = 96 << 20  # columns of one down projection held at once


def convert(
    hf_path: str | Path,
    flash_path: str | Path,
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int = 4,
    q_group_size: int = 64,
    dense_bits: int | None = None,
    requantize: bool = False,
    progress: bool = False,
    announce: Callable[[str], None] | None = None,
) -> Path:
    """Convert a Hugging Face checkpoint (folder or repository id) to a flash checkpoint; returns its path.

    revision: branch, tag or commit of a repository
    tokenizer: folder, file or repository id to take the tokenizer from, where the checkpoint has none
    dtype: "float32", "float16" or "bfloat16"; None keeps that of the checkpoint's FFNs
    quantize: store codes of `q_bits` (4 or 8), each `q_group_size` (32, 64, 128) of a row with a scale and a bias, in
        MLX's affine format; gate, up and down each along d, the dense part as mlx-lm does it, with `dense_bits`
        (None: `q_bits`; 16: as it is)
    requantize: with `quantize`, also what is quantised already; without, such a checkpoint is copied losslessly, and
        its bundles are groups of neurons that share scales
    progress: show a bar on stderr; announce: receives warnings (default: printed to stderr)

    Bundles are neurons, [gate row | up row | down column] ("LLM in a flash", section 3.2). Memory stays under
    0.5 GB. A conversion that fails or is killed leaves nothing that loads. Raises UsageError, ConfigError or
    FormatError for what cannot be converted, SpaceError, ReadError.
    """
    out = Path(flash_path)
    if dtype is not None:
        check_dtype(dtype)
    if out.exists():
        raise UsageError(f"{out} exists; remove it or choose another folder")
    if dense_bits is not None and not quantize:
        raise UsageError("--dense-bits goes with -q, which quantises")
    if quantize:
        check_options(q_bits, q_group_size, dense_bits)
    folder = find_folder(hf_path, revision=revision)
    words = None if tokenizer is None else _find_tokenizer(tokenizer)
    settings = Settings(dtype, (q_bits, q_group_size, dense_bits) if quantize else None, requantize)
    with _open(folder, requantize) as source:
        plan = make_plan(source, settings, words)
        if plan.note is not None:
            (announce or _to_stderr)(plan.note)
        if not any(path.name in TOKENIZERS for path in plan.tokenizer):
            (announce or _to_stderr)(
                f"{hf_path} has no tokenizer, without which the converted model cannot be loaded; "
                "give one with --tokenizer (OpenELM uses Llama 2's)"
            )
        if source.left_out:
            (announce or _to_stderr)(
                f"{hf_path} sees pictures too: {source.left_out} tensors of that are left out, it runs as a text model"
            )
        remove_stale(out.absolute().parent, out.name)  # what a killed conversion left takes room
        check_free_space(out.absolute().parent, plan.nbytes)
        _write(source, plan, out, progress, announce or _to_stderr)
    return out


def _open(folder: Path, requantise: bool) -> Source:
    """The source; for one that is quantised again, with its weights as numbers."""
    source = Source(folder)
    if requantise and source.config.get("quantization"):
        source.close()
        return Dequantised(folder)
    return source


def _find_tokenizer(place: str | Path) -> Path:
    """The folder, or the file, that the tokenizer is taken from. Raises UsageError if there is none."""
    if Path(place).is_file():
        if Path(place).name not in TOKENIZERS:
            raise UsageError(f"{place} is not a tokenizer; known files: {', '.join(TOKENIZERS)}")
        return Path(place)
    folder = find_folder(place, weights=False)
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise UsageError(f"{place} has no tokenizer: none of {', '.join(TOKENIZERS)}")
    return folder


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def _write(source: Source, plan: ConversionPlan, out: Path, progress: bool, announce: Callable[[str], None]) -> None:
    with FolderWriter(out) as writer, ThreadPoolExecutor(1, "convert") as worker:
        copies = GroupPipeline(source, plan.spec, plan.stored)
        pipeline = copies if plan.groups else _Pipeline(source, plan, worker)
        bar = tqdm(total=len(plan.layouts) + 1, desc="convert", unit="layer", disable=not progress, file=sys.stderr)
        with bar:
            for i, layout in enumerate(plan.layouts):
                pipeline.layer(writer.open(layer_file(i)), layout, i)
                bar.update()
            pipeline.finish()
            (copies if plan.copied else pipeline).resident(writer.open("model.safetensors"))
            pipeline.finish()
            bar.update()
        for path in plan.tokenizer + plan.copies:
            writer.copy_file(path, path.name)
        if plan.encoder is not None and plan.encoder.loss is not None:
            announce(
                f"requantised: the weights differ by {plan.encoder.loss.share:.3%} (root mean square of the whole)"
            )
        writer.commit(_with_calibration(source, plan, writer, announce))


def _with_calibration(
    source: Source, plan: ConversionPlan, writer: FolderWriter, announce: Callable[[str], None]
) -> dict[str, Any]:
    """The config. A calibration that lies beside the model is copied if it was made from exactly these weights."""
    if not (source.folder / SHIPPED).exists():
        return plan.config
    path = safe_file(source.folder, SHIPPED)
    try:
        counts = tuple(layout.count for layout in plan.layouts)
        read_calibration(path, plan.spec.dim, counts, model_identity(writer.files))
    except FormatError as error:
        announce(f"left out: {error}")
        return plan.config
    data = path.read_bytes()
    writer.write_bytes(file_name(data), data)
    return {**plan.config, "flash": {**plan.config["flash"], "calibration": file_name(data)}}


class _Pipeline:
    """Reads on the calling thread; transposes and writes on the worker, in order.

    A buffer is filled again only when the worker's last use of it has ended. Waiting for that also raises the worker's
    error.
    """

    def __init__(self, source: Source, plan: ConversionPlan, worker: ThreadPoolExecutor):
        self.source, self.plan, self.dtype, self.worker = source, plan, plan.dtype, worker
        dtype, dim, size = plan.dtype, plan.spec.dim, ITEM_BYTES[plan.dtype]
        stride = plan.spec.layout(0, dtype).stride
        self.rows = max(1, BLOCK_BYTES // stride)
        self.width = max(self.rows, PANEL_BYTES // (dim * size))  # columns of a panel
        widest = min(self.width, max(layout.count for layout in plan.layouts))
        # Zeroed once: the padding behind each bundle is never written.
        self.blocks = _Ring([np.zeros((self.rows, stride // size), RAW[dtype]) for _ in range(BLOCKS)])
        self.flats = _Ring([read_buffer(BLOCK_BYTES) for _ in range(BLOCKS)])
        self.panels = _Ring([np.empty(dim * widest, RAW[dtype]) for _ in range(2)])
        self.stage = read_buffer(0)
        self.failure: BaseException | None = None  # the worker's first; it does nothing more after that

    def layer(self, file: HashedFile, stored: Layout, index: int) -> None:
        """One layer's file, neurons ascending."""
        self._submit(file.write, layer_header(stored))
        refs, layout = self.plan.spec.ffn_sources(index), self.plan.spec.layout(index, self.dtype)
        encoder = self.plan.encoder
        encode = None if encoder is None else partial(encoder.encode, layout=stored, what=f"the FFN of layer {index}")
        down = next(ref for ref in refs.values() if ref.transposed)
        for first, panel, ring_slot in self._columns(down, layout.parts[0].length, layout.count):
            for start in range(0, panel.shape[1], self.rows):
                count = min(self.rows, panel.shape[1] - start)
                at, buffer = self.blocks.take()
                block = buffer[:count]
                columns = slice(0, 0)
                for part in layout.parts:
                    columns = slice(columns.stop, columns.stop + part.length)
                    if refs[part.name].transposed:
                        turn = (block[:, columns], panel[:, start : start + count])
                    else:
                        ref = refs[part.name]
                        size = part.length * ITEM_BYTES[self.source.dtype(ref.name)]
                        items = self._read(ref.name, (ref.first_row + first + start) * size, count * size)
                        block[:, columns] = items.reshape(count, part.length)
                done = self._submit(_turn_and_write, file, block, *turn, encode)
                self.blocks.give(at, done)
                self.panels.give(ring_slot, done)
        self._submit(file.close)

    def resident(self, file: HashedFile) -> None:
        """model.safetensors: the resident tensors, under their names."""
        stored, encoder = self.plan.stored, self.plan.encoder
        dtypes = {name: dtype for name, (dtype, _) in stored.items()}
        self._submit(
            file.write, safetensors_header({name: shape for name, (_, shape) in stored.items()}, dtypes, stored)
        )
        coded = [] if encoder is None else encoder.coded(self.plan.resident)
        for name, shape in self.plan.resident.items():
            kind = self.source.dtype(name)
            total = self.source.tensors[name].info.nbytes
            matrix = Matrix(encoder, shape[1], name) if encoder is not None and name in coded else None
            step = BLOCK_BYTES - BLOCK_BYTES % (shape[-1] * ITEM_BYTES[kind] if matrix else 1)
            for start in range(0, total, step):
                at, memory = self.flats.take()
                raw = self.source.read(name, start, min(step, total - start), memory).view(RAW[kind])
                items = cast(raw, kind, self.dtype, name)
                done = (
                    self._submit(file.write, items.data) if matrix is None else self._submit(matrix.write, file, items)
                )
                self.flats.give(at, done)
            if matrix is not None:
                self._submit(matrix.finish, file)
        self._submit(file.close)

    def finish(self) -> None:
        """Wait until everything is written; raises the worker's error."""
        self._submit(lambda: None).result()

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self.worker.submit(self._run, function, *arguments)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.failure is not None:  # else a file could go on behind a hole, and look whole
            raise self.failure
        try:
            return function(*arguments)
        except BaseException as error:
            self.failure = error
            raise

    def _columns(self, ref: TensorRef, dim: int, count: int) -> Iterator[tuple[int, np.ndarray, int]]:
        """A down projection (dim, count) by columns: (first column, panel (dim, n), slot in the ring)."""
        kind = self.source.dtype(ref.name)
        size = ITEM_BYTES[kind]
        for first in range(0, count, self.width):
            columns = min(self.width, count - first)
            at, memory = self.panels.take()
            panel = memory[: dim * columns].reshape(dim, columns)
            # Whole rows lie back to back: read many at once.
            step = max(1, BLOCK_BYTES // (columns * size)) if columns == count else 1
            for row in range(0, dim, step):
                rows = min(step, dim - row)
                items = self._read(ref.name, (row * count + first) * size, rows * columns * size)
                panel[row : row + rows] = items.reshape(rows, columns)
            yield first, panel, at

    def _read(self, name: str, start: int, count: int) -> np.ndarray:
        """`count` bytes of a tensor as items of our dtype; good until the next read."""
        if self.stage.size < count + 2 * READ_ALIGN:
            self.stage = read_buffer(count)
        kind = self.source.dtype(name)
        return cast(self.source.read(name, start, count, self.stage).view(RAW[kind]), kind, self.dtype, name)


class _Ring:
    """A few arrays used in turn; `take` waits until the task that used the oldest one last is done."""

    def __init__(self, arrays: list[np.ndarray]):
        self._arrays = arrays
        self._users: list[Future[Any] | None] = [None] * len(arrays)
        self._next = 0

    def take(self) -> tuple[int, np.ndarray]:
        at = self._next
        self._next = (at + 1) % len(self._arrays)
        user, self._users[at] = self._users[at], None
        if user is not None:
            user.result()
        return at, self._arrays[at]

    def give(self, at: int, user: Future[Any]) -> None:
        self._users[at] = user


def _turn_and_write(
    file: HashedFile,
    block: np.ndarray,
    target: np.ndarray,
    panel: np.ndarray,
    encode: Callable[[np.ndarray], np.ndarray] | None,
) -> None:
    """Write block (n, stride items) with panel (dim, n) transposed into its `target` (n, dim) columns. encode: makes
    the bytes to write of the block."""
    for row in range(0, len(panel), 32):  # a whole .T walks panel and block a cache line per item: ten times slower
        target[:, row : row + 32] = panel[row : row + 32].T
    file.write((block if encode is None else encode(block)).data)
