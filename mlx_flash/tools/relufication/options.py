"""The settings of a relufication, checked before it begins."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_flash.errors import UsageError

ACTIVATIONS = ("relu", "fatrelu")
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class RelufyConfig:
    """How a model is relufied; raises UsageError for what cannot be.

    activation: "relu", or "fatrelu": x where x > t, else 0, with one t per layer
    target_sparsity: share of exact zeros. fatrelu: what the t of every layer gives on the text right after replacing
        (None: 0.9). With `pressure`, a loss on gate activations also leads the model there while it learns
    pressure: None: for relu where there is a target, as ReLU alone leaves about half
    tokens: of text to learn from, the last 5 % (64 contexts at most) held out; steps: each sees `batch` texts of
        `context` tokens (None: the model's context, 512 at most)
    hidden_weight: of the distance between the hidden states of both models, beside the KL divergence of their logits
    lr: highest learning rate of AdamW (None: 0.2 / the model's width)
    precision: "float32", or "bfloat16" for products only; device: "auto", "cpu", "cuda" or "mps"
    """

    activation: str = "relu"
    target_sparsity: float | None = None
    pressure: bool | None = None
    tokens: int = 1_000_000
    steps: int = 1000
    batch: int = 16
    context: int | None = None
    lr: float | None = None
    hidden_weight: float = 0.0
    seed: int = 0
    precision: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (("activation", ACTIVATIONS), ("device", DEVICES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise UsageError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name, least in (("tokens", 1), ("steps", 1), ("batch", 1), ("seed", 0), ("context", 8)):
            value = getattr(self, name)
            if not (value is None and name == "context") and (type(value) is not int or value < least):
                raise UsageError(f"{name} is {value!r}; it must be a whole number from {least} up")
        if self.seed >= 1 << 40:
            raise UsageError(f"seed is {self.seed}; it must be below 2^40")
        if self.target_sparsity is not None and not 0 < self.target_sparsity < 1:
            raise UsageError(f"target_sparsity is {self.target_sparsity}; it must lie between 0 and 1, such as 0.9")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"lr is {self.lr}; it must be a positive number")
        if not 0 <= self.hidden_weight < math.inf:
            raise UsageError(f"hidden_weight is {self.hidden_weight}; it must be a number from 0 up")
        if self.pressure and self.target_sparsity is None:
            raise UsageError("pressure needs a target_sparsity to lead to")

    @property
    def cut_sparsity(self) -> float | None:
        """The share of zeros that the cut-offs are chosen for; None: cut-offs of 0."""
        return None if self.activation == "relu" else self.target_sparsity or 0.9

    @property
    def led_to(self) -> float | None:
        """The share of zeros that the loss leads to, if any."""
        pressure = self.activation == "relu" if self.pressure is None else self.pressure
        return self.target_sparsity if pressure else None
