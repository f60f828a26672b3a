"""One relufication, from the original's weights to the new folder, and the saved state of an unfinished one.

Knows files, text and scores; the arithmetic is in distillation.py. PyTorch is imported only when something runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from mlx_flash.engine.numerics.casting import RAW, to_float32
from mlx_flash.engine.storage.writer import FolderWriter
from mlx_flash.errors import FlashError, FormatError, SpaceError, UsageError
from mlx_flash.models.conversion.plan import normalised_config
from mlx_flash.models.specs.folder import WEIGHTS, safe_file
from mlx_flash.models.specs.model_spec import ModelSpec
from mlx_flash.models.specs.source import Source, read_buffer, source_hash, tokenizer_files
from mlx_flash.models.specs.wrappers import unwrap
from mlx_flash.models.text.tokenizer import load_tokenizer

from .options import RelufyConfig
from .token_rows import pick, read_rows

if TYPE_CHECKING:
    import torch

CUTOFFS = "fatrelu_thresholds"
COPIED = ("generation_config.json",)
CALIBRATION_ROWS = 32
WRITTEN_AT_ONCE = 4  # batches: writing needs less memory than learning
HELD_SHARE, HELD_ROWS = 0.05, 64
SAVE_S = 60.0


def tensor_names(spec: ModelSpec) -> list[str]:
    return [*spec.resident_shapes(), *spec.ffn_shapes()]


class RelufyRun:
    """One relufication: `begin`, `learn`, then `write` the folder."""

    def __init__(
        self,
        source: Source,
        spec: ModelSpec,
        config: RelufyConfig,
        context: int,
        out: Path,
        progress: bool,
        save_every_s: float = SAVE_S,
    ) -> None:
        import torch

        from . import torch_decoder

        self.source, self.spec, self.config, self.context, self.out = source, spec, config, context, out
        self.torch, self.progress, self.save_every_s = torch, progress, save_every_s
        self.saved = out.absolute().with_name(f".{out.name}.relufy.pt")
        self.device = torch.device(_best_device(torch) if config.device == "auto" else config.device)
        kind = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        weights = {name: self._read(name).to(self.device, kind) for name in tensor_names(spec)}
        cutoffs = None if spec.activation == "silu" else [layer.cutoff for layer in spec.layers]
        self.original = torch_decoder.TorchDecoder(spec, weights, cutoffs, context)
        self.state: dict[str, Any] = {"scores": {}}

    def _read(self, name: str) -> torch.Tensor:
        info, kind = self.source.tensors[name].info, self.source.dtype(name)
        raw = self.source.read(name, 0, info.nbytes, read_buffer(info.nbytes)).view(RAW[kind])
        return self.torch.from_numpy(to_float32(raw, kind).reshape(info.shape))

    def begin(self, data: str | Path | np.ndarray | None, resume: bool) -> None:
        """Prepare the text, the cut-offs and the scores before training, or restore those of an unfinished run."""
        from .distillation import Distillation, choose_cutoffs

        config, spec = self.config, self.spec
        count = config.tokens // self.context
        if count < 2:
            raise UsageError(f"{config.tokens} tokens are less than two contexts of {self.context}; take more tokens")
        read = None if data is None else self._rows_of(data, count)
        digest = "" if read is None else hashlib.sha256(read.tobytes()).hexdigest()
        described = [asdict(config) | {"device": "", "context": self.context}, source_hash(self.source.folder), digest]
        key = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        if resume and self.saved.exists():
            self.state = self._load(key)
        self.state["key"] = key
        rows = self.write_text(count) if read is None else read
        self.rows = self.torch.from_numpy(rows).long().to(self.device)
        held = max(1, min(HELD_ROWS, round(HELD_SHARE * len(rows))))
        self.train, self.held = self.rows[:-held], self.rows[-held:]
        if "cutoffs" not in self.state:
            target, few = config.cut_sparsity, self.train[:CALIBRATION_ROWS]
            zeros = [0.0] * len(spec.layers)
            cutoffs = zeros if target is None else choose_cutoffs(self.original, few, config.batch, target, config.seed)
            self.state["cutoffs"] = [float(np.float32(cutoff)) for cutoff in cutoffs]
        self.run = Distillation(
            self.original,
            self.state["cutoffs"],
            steps=config.steps,
            lr=config.lr or 0.2 / spec.dim,
            led_to=config.led_to,
            hidden_weight=config.hidden_weight,
            precision=config.precision,
        )
        if "learnt" in self.state:
            self.run.restore(self.state.pop("learnt"))
        else:
            self.score("original", self.original)
            self.score("replaced", self.run.copy)
            self._save()  # where nothing can be written, that is found before hours of work

    def score(self, name: str, decoder: Any) -> None:
        score = self.run.score(decoder, self.held, self.config.batch, self.spec.bos_id)
        self.state["scores"][name] = score.to_json()

    def _rows_of(self, data: str | Path | np.ndarray, count: int) -> np.ndarray:
        if not isinstance(data, np.ndarray):
            tokenizer = load_tokenizer(self.source.folder, self.spec.eos_ids)
            return read_rows(Path(data), tokenizer, self.spec.bos_id, self.spec.vocab, count, self.context)
        if data.ndim != 2 or data.shape[1] != self.context or len(data) < 2:
            raise UsageError(f"the ids are {data.shape}; they must be two rows or more of {self.context}, the context")
        if data.min() < 0 or data.max() >= self.spec.vocab:
            raise UsageError(f"the ids reach from {data.min()} to {data.max()}, the model has {self.spec.vocab}")
        return data[:count].astype(np.int32)

    def write_text(self, count: int) -> np.ndarray:
        """(count, context) ids that the original writes itself; rows written before an interruption are kept."""
        from .torch_decoder import sample_texts

        bos = self.spec.bos_id if self.spec.bos_id is not None else next(iter(self.spec.eos_ids), None)
        if bos is None:
            raise UsageError(
                "the config names no bos_token_id for the model to begin a text with; give it a text: data"
            )
        parts = [self.state["ids"]] if "ids" in self.state else []
        done, size = sum(map(len, parts)), WRITTEN_AT_ONCE * self.config.batch
        with self._bar("text", count, done) as bar:
            timer = SaveTimer(self.save_every_s)
            while done < count:
                now = min(size, count - done)
                generator = self.torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + done)
                made = sample_texts(self.original, now, self.context, bos, self.spec.eos_ids, generator)
                parts.append(made.to("cpu", self.torch.int32))
                done += now
                bar.update(now)
                self.state["ids"] = self.torch.cat(parts)
                timer.save_when_due(self._save)
        return self.state["ids"].numpy()

    def learn(self) -> None:
        """Run the remaining steps; the state is saved every `save_every_s` seconds."""
        config, timer = self.config, SaveTimer(self.save_every_s)
        with self._bar("relufy", config.steps, self.run.step_number) as bar:
            while self.run.step_number < config.steps:
                picked = pick(self.run.step_number * config.batch, config.batch, len(self.train), config.seed)
                kl, zeros = self.run.step(self.train[self.torch.from_numpy(picked).to(self.device)])
                bar.set_postfix(kl=f"{kl:.4f}", zeros=f"{zeros:.3f}", refresh=False)
                bar.update()
                timer.save_when_due(lambda: self._save(self.run.state()))

    def write(self) -> dict[str, Any]:
        """Write the folder, whole or not at all; returns the report."""
        from safetensors.torch import save_file

        kinds = {"float32": self.torch.float32, "float16": self.torch.float16, "bfloat16": self.torch.bfloat16}
        rounded: dict[str, torch.Tensor] = {}
        with self.torch.no_grad():
            for name, weight in self.run.weights.items():
                rounded[name] = weight.to(kinds[self.source.dtype(name)])
                if not bool(rounded[name].isfinite().all()):
                    raise FlashError(f"{name} has left the range of {self.source.dtype(name)}; take a lower lr")
                weight.copy_(rounded[name])
        self.score("recovered", self.run.copy)
        with FolderWriter(self.out) as writer:
            try:
                tensors = {name: weight.to("cpu").contiguous() for name, weight in rounded.items()}
                save_file(tensors, writer.path / WEIGHTS, metadata={"format": "pt"})
                others = [safe_file(self.source.folder, n) for n in COPIED if (self.source.folder / n).exists()]
                for path in others + tokenizer_files(self.source.folder):
                    writer.copy_file(path, path.name)
                text = json.dumps(self.new_config(), indent=2, ensure_ascii=False) + "\n"
                (writer.path / "config.json").write_text(text, encoding="utf-8")
                # safetensors makes its file for the owner alone.
                (writer.path / WEIGHTS).chmod((writer.path / "config.json").stat().st_mode)
                for path in writer.path.iterdir():
                    with open(path, "r+b") as file:
                        os.fsync(file.fileno())
                os.rename(writer.path, writer.final)
            except OSError as error:
                raise writer.explain(error, writer.path) from error
        self.saved.unlink(missing_ok=True)
        report = {
            "path": str(self.out),
            "activation": self.config.activation,
            "cutoffs": self.state["cutoffs"],
            "steps": self.config.steps,
            "tokens_learnt_from": self.config.steps * self.config.batch * self.context,
            "tokens_held_out": self.held.numel(),
        }
        return report | self.state["scores"]

    def new_config(self) -> dict[str, Any]:
        kind = self.source.dtype(next(iter(self.spec.ffn_shapes())))
        config = normalised_config(unwrap(dict(self.source.config)), self.spec, kind)
        config.pop(CUTOFFS, None)
        config[self.spec.table.activation_key] = self.config.activation
        return config | ({CUTOFFS: self.state["cutoffs"]} if self.config.activation == "fatrelu" else {})

    def _bar(self, text: str, total: int, initial: int) -> Any:
        return tqdm(total=total, initial=initial, desc=text, disable=not self.progress, file=sys.stderr)

    def _save(self, learnt: dict[str, Any] | None = None) -> None:
        temporary = self.saved.with_name(self.saved.name + ".new")
        try:
            self.saved.parent.mkdir(parents=True, exist_ok=True)
            self.torch.save(self.state if learnt is None else self.state | {"learnt": learnt}, temporary)
            os.replace(temporary, self.saved)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise SpaceError(f"cannot save the unfinished run in {self.saved}: {error}") from error

    def _load(self, key: str) -> dict[str, Any]:
        try:
            state = self.torch.load(self.saved, map_location="cpu", weights_only=True)
            found = state["key"]
        except Exception as error:  # whatever a damaged file makes of it
            raise FormatError(f"{self.saved} cannot be read ({error}); delete it to start from the beginning") from None
        if found != key:
            raise UsageError(
                f"{self.saved} is an unfinished run with other settings, text or weights; repeat those, or delete it"
            )
        return dict(state)


class SaveTimer:
    """Saves every `every_s` seconds, or less often where saving would take more than a twentieth of the time; 0: each
    time it is asked."""

    def __init__(self, every_s: float) -> None:
        self.every_s, self.last, self.cost = every_s, time.monotonic(), 0.0

    def save_when_due(self, save: Callable[[], None]) -> None:
        begin = time.monotonic()
        if self.every_s and begin - self.last < max(self.every_s, 20 * self.cost):
            return
        save()
        self.last = time.monotonic()
        self.cost = self.last - begin


def _best_device(torch: Any) -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
