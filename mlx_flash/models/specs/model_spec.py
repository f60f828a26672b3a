"""What a model is made of: layers, positions, and the name and shape of every tensor. Made from config.json by
`config_reader`; knows neither files nor backends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_flash.engine.storage.bundle import Layout, Part

from .families import Family

OPT_POSITION_OFFSET = 2  # OPT's learned positions begin at row 2


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the base, and what the config's kind of scaling needs (`rotary.read_rope`).

    attention_factor, long_attention_factor: of cosines and sines, with short and with long factors.
    short_factors, long_factors: of `longrope`, one per frequency. rotated: the share of `proportional` that turns.
    alpha: of `ntk_alpha`, how far the base is stretched.
    """

    base: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    long_attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    rotated: float = 1.0
    alpha: float = 1.0


@dataclass(frozen=True)
class ContextLimit:
    """Why a run's context ends before the model's: beyond `tokens` its output would differ from the original's.

    hard: whether a longer context is refused; if not, it is possible, and `beyond` says what it means
    """

    tokens: int
    reason: str
    hard: bool = True
    beyond: str = ""


@dataclass(frozen=True)
class LayerSpec:
    """The sizes of one layer.

    cutoff: FATReLU's threshold; activations up to it are zero
    window: how many tokens, itself included, a token sees; None: all before it
    """

    heads: int
    kv_heads: int
    intermediate: int
    cutoff: float = 0.0
    window: int | None = None


@dataclass(frozen=True)
class TensorRef:
    """Rows `first_row .. first_row+rows` of a checkpoint tensor; `transposed`: its columns are the neurons."""

    name: str
    first_row: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """All that a backend needs to know of a model. Lengths are in items, `max_context` in tokens.

    limit: why a run's context may have to be shorter than the model's
    clip: the largest magnitude of a query, key or value; None: any
    norm_after: norms follow attention and FFN, and there is none at the end
    embed_dim: the width of embeddings that are projected to the model's width and back; None: they are not
    """

    family: str
    dim: int
    vocab: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    activation: str
    eps: float
    tied: bool
    max_context: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    rope: Rope | None
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool
    ffn_bias: bool
    table: Family
    limit: ContextLimit | None = field(default=None, kw_only=True)
    clip: float | None = field(default=None, kw_only=True)
    norm_after: bool = field(default=False, kw_only=True)
    embed_dim: int | None = field(default=None, kw_only=True)

    @property
    def gated(self) -> bool:
        return self.table.gated

    @property
    def kv_items_per_token(self) -> int:
        """Items that one token adds to the KV cache, all layers."""
        return sum(2 * layer.kv_heads * self.head_dim for layer in self.layers)

    @property
    def has_zeros(self) -> bool:
        """Whether neurons are exactly zero for most tokens."""
        return self.activation in ("relu", "fatrelu")

    @property
    def kernel_activation(self) -> str:
        """What backends compute: FATReLU is ReLU and a layer's cut-off."""
        return "relu" if self.has_zeros else self.activation

    def name(self, role: str, layer: int = 0) -> str:
        """The module that plays `role`, without `.weight` or `.bias`."""
        return self.table.names[role].format(i=layer)

    def layout(self, layer: int, dtype: str) -> Layout:
        """A bundle is gate row, up row, down column (plain MLP: up row, down column)."""
        parts = ("gate", "up", "down") if self.gated else ("up", "down")
        return Layout(tuple(Part(p, dtype, self.dim) for p in parts), self.layers[layer].intermediate)

    def ffn_sources(self, layer: int) -> dict[str, TensorRef]:
        """For each part of a bundle, the tensor whose rows (or columns) it takes."""
        count, names = self.layers[layer].intermediate, self.table.names
        down = TensorRef(self.name("down", layer) + ".weight", transposed=True)
        if "gate+up" in names:  # gate rows first
            fused = self.name("gate+up", layer) + ".weight"
            return {"gate": TensorRef(fused), "up": TensorRef(fused, first_row=count), "down": down}
        rows = ("gate", "up") if self.gated else ("up",)
        return {role: TensorRef(self.name(role, layer) + ".weight") for role in rows} | {"down": down}

    def ffn_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the checkpoint tensors that become bundles."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i, layer in enumerate(self.layers):
            for part, ref in self.ffn_sources(i).items():
                rows = layer.intermediate * (2 if "gate+up" in self.table.names and part != "down" else 1)
                shapes[ref.name] = (self.dim, layer.intermediate) if ref.transposed else (rows, self.dim)
        return shapes

    def resident_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that stays resident."""
        shapes: dict[str, tuple[int, ...]] = {}

        def norm(role: str, size: int, layer: int = 0) -> None:
            shapes[self.name(role, layer) + ".weight"] = (size,)
            if self.table.norm == "layer":
                shapes[self.name(role, layer) + ".bias"] = (size,)

        def linear(role: str, rows: int, columns: int, layer: int, bias: bool) -> None:
            shapes[self.name(role, layer) + ".weight"] = (rows, columns)
            if bias:
                shapes[self.name(role, layer) + ".bias"] = (rows,)

        embed_dim = self.embed_dim or self.dim
        linear("embed", self.vocab, embed_dim, 0, False)
        if self.embed_dim is not None:
            linear("project_in", self.dim, embed_dim, 0, False)
            linear("project_out", embed_dim, self.dim, 0, False)
        if "positions" in self.table.names:
            linear("positions", self.max_context + OPT_POSITION_OFFSET, self.dim, 0, False)
        if not self.norm_after:
            norm("norm", self.dim)
        if not self.tied:
            linear("head", self.vocab, embed_dim, 0, False)
        for i, layer in enumerate(self.layers):
            q, kv = layer.heads * self.head_dim, layer.kv_heads * self.head_dim
            norm("attn_norm", self.dim, i)
            norm("ffn_norm", self.dim, i)
            if "qkv" in self.table.names:
                linear("qkv", q + 2 * kv, self.dim, i, self.qkv_bias)
            else:
                for role, rows in (("q", q), ("k", kv), ("v", kv)):
                    linear(role, rows, self.dim, i, self.qkv_bias)
            linear("o", self.dim, q, i, self.out_bias)
            if self.qk_norm:
                norm("q_norm", self.head_dim, i)
                norm("k_norm", self.head_dim, i)
            if self.ffn_bias:
                for role in ("gate", "up") if self.gated else ("up",):
                    shapes[self.name(role, i) + ".bias"] = (layer.intermediate,)
                shapes[self.name("down", i) + ".bias"] = (self.dim,)
        return shapes
