"""Trains a decoder with exact zeros to give the original's output: cut-offs, losses, steps, and scores.

Knows tensors and token ids; reads and writes no files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mlx_flash.errors import FlashError

from .torch_decoder import Seen, TorchDecoder

SAMPLES = 1 << 20  # gates per layer that a cut-off is chosen from
PRESSURE_START, PRESSURE_LEAST, PRESSURE_MOST = 0.3, 1e-3, 100.0
RAMP, WARM_UP = 0.6, 0.05  # shares of the steps: until the target is asked for in full; until the rate is


@dataclass
class Score:
    """A decoder's figures on held-out text: `nats_per_token`, `zeros` (share of exact zeros after the activation,
    all layers), `kl` (nats per token from the original), `layer_zeros`."""

    nats_per_token: float
    zeros: float
    kl: float
    layer_zeros: list[float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity": math.exp(min(self.nats_per_token, 700.0))}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def divergence(original: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """(B, T) nats: KL(original || logits) at temperature 1."""
    log_p, log_q = original.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def evaluate(decoder: TorchDecoder, original: TorchDecoder, rows: torch.Tensor, size: int, bos: int | None) -> Score:
    """The score on rows (N, T), `size` at a time. `bos` as a target is not scored: a model never has to predict it."""
    nats = kl = scored = 0.0
    neurons = torch.tensor([layer.intermediate for layer in decoder.spec.layers], dtype=torch.float64)
    zeros = torch.zeros(len(neurons), dtype=torch.float64)
    for begin in range(0, len(rows), size):
        ids, seen = rows[begin : begin + size], Seen()
        logits = decoder(ids, seen=seen)[:, :-1].float()
        target = ids[:, 1:]
        counts = target != (-1 if bos is None else bos)
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        nats += float(losses[counts].sum())
        scored += int(counts.sum())
        kl += float(divergence(original(ids)[:, :-1], logits)[counts].sum())
        for i, gate in enumerate(seen.gates):
            zeros[i] += float((decoder.activate(i, gate) == 0).float().mean()) * len(ids)
    zeros /= len(rows)
    share = float((zeros * neurons).sum() / neurons.sum())
    return Score(nats / scored, share, max(kl / scored, 0.0), zeros.tolist())


@torch.no_grad()
def choose_cutoffs(original: TorchDecoder, rows: torch.Tensor, size: int, target: float, seed: int) -> list[float]:
    """Per layer the `target` quantile of its gates on `rows` (N, T), at least 0, so that this share of the
    activations becomes zero."""
    generator = torch.Generator().manual_seed(seed)
    wanted = max(1, SAMPLES // math.ceil(len(rows) / size))
    samples: list[list[torch.Tensor]] = [[] for _ in original.spec.layers]
    for begin in range(0, len(rows), size):
        seen = Seen()
        original(rows[begin : begin + size], seen=seen)
        for sample, gate in zip(samples, seen.gates, strict=True):
            picked = torch.randint(gate.numel(), (wanted,), generator=generator)
            sample.append(gate.flatten()[picked.to(gate.device)].float().cpu())
    return [max(0.0, float(torch.cat(sample).quantile(target))) for sample in samples]


class Pressure:
    """The weight of the sparsity loss, adjusted so that the share of zeros follows a ramp to `target`. None: no such
    loss."""

    def __init__(self, target: float | None, steps: int):
        self.target, self.steps = target, steps
        self.start, self.base, self.weight = -1.0, PRESSURE_START, 0.0 if target is None else PRESSURE_START

    def update(self, step: int, zeros: float) -> None:
        """After a step whose batch had this share of zeros."""
        if self.target is None:
            return
        self.start = zeros if step == 0 else self.start
        missing = self.start + min(1.0, (step + 1) / (RAMP * self.steps)) * (self.target - self.start) - zeros
        # Zeros come while the weight is high, rather than in proportion to it: the base alone would overshoot.
        self.base = min(PRESSURE_MOST, max(PRESSURE_LEAST, self.base * math.exp(0.02 * max(-1, min(1, 20 * missing)))))
        self.weight = min(PRESSURE_MOST, self.base * math.exp(30 * missing))


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return highest * (step + 1) / warm
    return highest * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def activity(decoder: TorchDecoder, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """(L1, zeros): per layer the mean of activations above the cut-off, divided by the mean size of a gate, then the
    mean over all neurons; and the share of zeros."""
    assert decoder.cutoffs is not None
    neurons = [layer.intermediate for layer in decoder.spec.layers]
    l1, zeros = [], []
    for gate, cutoff, count in zip(seen.gates, decoder.cutoffs, neurons, strict=True):
        wide = gate.float()
        above = F.relu(wide - cutoff)
        l1.append(count * above.mean() / wide.detach().abs().mean().clamp_min(1e-12))
        zeros.append(count * (above == 0).float().mean().detach())
    return torch.stack(l1).sum() / sum(neurons), torch.stack(zeros).sum() / sum(neurons)


def hidden_distance(original: Sequence[torch.Tensor], seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the squared distance of hidden states, over the original's mean square."""
    pairs = zip(original, seen, strict=True)
    return torch.stack([F.mse_loss(b.float(), a.float()) / a.float().square().mean() for a, b in pairs]).mean()


class Distillation:
    """The original, its copy with exact zeros, and the state that a training step changes.

    cutoffs: of the copy; led_to: share of zeros that the loss leads to, None for no such loss
    """

    def __init__(
        self,
        original: TorchDecoder,
        cutoffs: Sequence[float],
        *,
        steps: int,
        lr: float,
        led_to: float | None = None,
        hidden_weight: float = 0.0,
        precision: str = "float32",
    ):
        self.original, self.steps, self.lr = original, steps, lr
        self.hidden_weight, self.precision = hidden_weight, precision
        self.weights = {name: w.detach().float().clone() for name, w in original.weights.items()}
        self.copy = TorchDecoder(original.spec, self.weights, cutoffs, len(original.turns[0]))
        self.pressure = Pressure(led_to, steps)
        self.step_number = 0
        parameters = [weight.requires_grad_() for weight in self.weights.values()]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)

    def score(self, decoder: TorchDecoder, rows: torch.Tensor, size: int, bos: int | None) -> Score:
        with autocast(rows.device, self.precision):
            return evaluate(decoder, self.original, rows, size, bos)

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """Learn from ids (B, T); returns the KL divergence and the share of zeros before. Raises FlashError."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step_number, self.steps, self.lr)
        theirs, ours = Seen(), Seen()
        with autocast(ids.device, self.precision):
            with torch.no_grad():
                wanted = self.original(ids, seen=theirs)
            kl = divergence(wanted, self.copy(ids, seen=ours)).mean()
            l1, zeros = activity(self.copy, ours)
            loss = kl + self.pressure.weight * l1 if self.pressure.weight else kl
            if self.hidden_weight:
                loss = loss + self.hidden_weight * hidden_distance(theirs.hidden, ours.hidden)
        reached, share = float(kl.detach()), float(zeros)
        if not math.isfinite(float(loss.detach())):
            raise FlashError(f"the loss is {float(loss.detach())} at step {self.step_number + 1}; take a lower lr")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        self.optimizer.step()
        self.pressure.update(self.step_number, share)
        self.step_number += 1
        return reached, share

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on: tensors and numbers."""
        return {
            "step": self.step_number,
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "pressure": [self.pressure.start, self.pressure.base, self.pressure.weight],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step_number = state["step"]
        self.pressure.start, self.pressure.base, self.pressure.weight = state["pressure"]
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
