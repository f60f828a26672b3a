"""Our own decoder: one for every family, driven by its `ModelSpec`, on any `DecoderBackend`.

Shapes: T new tokens, d the width, H query heads that share K key/value heads of size D. Activations are fp32; weights
have the backend's form. The FFN is a callable per layer: nothing here knows what is resident and what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import proxy

import numpy as np

from mlx_flash.engine.backends.decoder_base import Activations, Attention, DecoderBackend, Linear, Norm, Weights
from mlx_flash.engine.selection.context import SharedContext
from mlx_flash.engine.storage.checkpoint import Checkpoint
from mlx_flash.engine.storage.resident_tensors import load_tensors
from mlx_flash.errors import UsageError
from mlx_flash.models.prompt_cache import PromptCache
from mlx_flash.models.specs.known_keys import OWN, OWN_MIXTURES
from mlx_flash.models.specs.mixtures import is_mixture
from mlx_flash.models.specs.model_spec import OPT_POSITION_OFFSET, ModelSpec
from mlx_flash.models.specs.quantisation import join_coded, resident_codings, resident_shapes
from mlx_flash.models.specs.rotary import attention_factor, inverse_frequencies
from mlx_flash.models.text.sampling import Sampling, make_sampler
from mlx_flash.models.text.tokenizer import Tokenizer
from mlx_flash.models.text.tokenizer import load_tokenizer as load_tokenizer_files

FFN = Callable[[np.ndarray], np.ndarray]
KeysValues = tuple[np.ndarray, np.ndarray]  # of one layer: the backend's caches, (K, context, D) each


class ModelRun(Protocol):
    """The run that a model's FFNs read through: `model.flash`."""

    shared: SharedContext


class Layer:
    """Attention, norms and FFN of one layer."""

    def __init__(self, decoder: Decoder, index: int, ffn: FFN):
        # A proxy: a cycle would keep the weights in memory after the model is dropped.
        self.decoder, self.backend, self.ffn = proxy(decoder), decoder.backend, ffn
        self.shape = decoder.spec.layers[index]
        self.index = index
        inputs = ["qkv"] if "qkv" in decoder.spec.table.names else ["q", "k", "v"]
        self.matrices = {role: decoder.matrix(role, index) for role in [*inputs, "o"]}
        norms = ["attn_norm", "ffn_norm"] + (["q_norm", "k_norm"] if decoder.spec.qk_norm else [])
        self.norms = {role: decoder.vectors(role, index) for role in norms}
        self._step: Callable[[], None] | None = None
        self._step_cache: KeysValues | None = None  # that it is made for

    def __call__(self, x: np.ndarray, cache: Cache, start: int) -> np.ndarray:
        step = self.step(cache) if len(x) == 1 and not self.decoder.spec.norm_after else None
        if step is not None:
            return self.decode(step, x, start)
        if self.decoder.spec.norm_after:
            x = self.decoder.norm(x + self.attend(x, cache, start), *self.norms["attn_norm"])
            return self.decoder.norm(x + self.ffn(x), *self.norms["ffn_norm"])
        h = self.decoder.norm(x, *self.norms["attn_norm"])
        x = x + self.attend(h, cache, start)
        return x + self.ffn(self.decoder.norm(x, *self.norms["ffn_norm"]))

    def decode(self, step: Callable[[], None], x: np.ndarray, start: int) -> np.ndarray:
        """Run one token, x (1, d). The result's memory is used again by the next layer, or the next token."""
        memory = self.decoder.memory
        if x is not memory.x:
            memory.x[...] = x
        memory.position[0] = start
        self.backend.decode(step)
        memory.x += self.ffn(memory.h)
        return memory.x

    def step(self, cache: Cache) -> Callable[[], None] | None:
        """The backend's step for one token: the whole layer without its FFN. None if it has no such step."""
        if self.decoder.spec.clip is not None:
            return None
        found = cache.layers[self.index]
        if self._step_cache is not found:
            self._step, self._step_cache = self.backend.attention(self.description(*found), self.decoder.memory), found
        return self._step

    def description(self, keys: np.ndarray, values: np.ndarray) -> Attention:
        """What the backend needs to know for such a step."""
        spec, of, norms = self.decoder.spec, self.matrices, self.norms
        return Attention(
            heads=self.shape.heads,
            kv_heads=self.shape.kv_heads,
            size=spec.head_dim,
            norm=spec.table.norm,
            eps=spec.eps,
            before=norms["attn_norm"],
            after=norms["ffn_norm"],
            inputs=[of["qkv"]] if "qkv" in of else [of["q"], of["k"], of["v"]],
            output=of["o"],
            q_norm=norms.get("q_norm"),
            k_norm=norms.get("k_norm"),
            rotations=self.decoder.rotations,
            keys=keys,
            values=values,
            window=self.shape.window,
        )

    def linear(self, role: str, x: np.ndarray) -> np.ndarray:
        weight, bias = self.matrices[role]
        return self.backend.linear(x, weight, bias)

    def normed(self, role: str, x: np.ndarray) -> np.ndarray:
        """x (T, heads, D), normalised over as many items as the norm has weights: each head, or all at once."""
        weight, bias = self.norms[role]
        return self.decoder.norm(x.reshape(len(x), -1, len(weight)), weight, bias).reshape(x.shape)

    def attend(self, x: np.ndarray, cache: Cache, start: int) -> np.ndarray:  # (T, d) -> (T, d)
        heads, kv_heads, size = self.shape.heads, self.shape.kv_heads, self.decoder.spec.head_dim
        if "qkv" in self.matrices:
            q, k, v = np.split(self.linear("qkv", x), [heads * size, (heads + kv_heads) * size], axis=-1)
        else:
            q, k, v = (self.linear(role, x) for role in ("q", "k", "v"))
        q, k, v = (part.reshape(len(x), -1, size) for part in (q, k, v))  # (T, H or K, D)
        if "q_norm" in self.norms:
            q, k = self.normed("q_norm", q), self.normed("k_norm", k)
        if (most := self.decoder.spec.clip) is not None:
            q, k, v = (np.clip(part, -most, most) for part in (q, k, v))
        if self.decoder.rotations is not None:
            cos, sin = self.decoder.rotations[:, start : start + len(x)]
            q, k = self.backend.rope(q, cos, sin), self.backend.rope(k, cos, sin)
        keys, values = cache.layers[self.index]
        self.backend.store(keys, start, k)
        self.backend.store(values, start, v)
        y = self.backend.attend(q, keys, values, start, self.shape.window)  # (T, H, D)
        return self.linear("o", y.reshape(len(x), heads * size))


class Cache:
    """Keys and values of the tokens seen so far, `context` tokens at most, in the checkpoint's dtype: per layer a
    pair of (K, context, D)."""

    def __init__(self, layers: list[KeysValues]):
        self.layers, self.length = layers, 0


class Decoder:
    """A language model: `decoder(ids, cache)` gives the logits that follow the last id.

    `flash` is the run that the FFNs read through (set by `mlx_flash.load`).
    """

    flash: ModelRun

    def __init__(
        self, spec: ModelSpec, backend: DecoderBackend, tensors: Mapping[str, Weights], dtype: str, context: int
    ):
        self.spec, self.backend, self.tensors = spec, backend, tensors
        self.dtype, self.context = dtype, context
        self.rotations = None  # (2, context, D/2): cosines and sines
        if spec.rope is not None:
            inverse = inverse_frequencies(spec.rope, spec.head_dim, context)
            self.rotations = np.empty((2, context, len(inverse)), np.float32)
            for begin in range(0, context, 4096):  # in pieces: angles are fp64
                angle = np.arange(begin, min(begin + 4096, context))[:, None] * inverse
                self.rotations[:, begin : begin + 4096] = np.cos(angle), np.sin(angle)
            self.rotations *= np.float32(attention_factor(spec.rope, context))
        self.embed = self.matrix("embed")[0]
        self.head = self.embed if spec.tied else self.matrix("head")[0]
        self.positions = self.matrix("positions")[0] if "positions" in spec.table.names else None
        self.last_norm = None if spec.norm_after else self.vectors("norm")
        self.projections = None  # from the embedding's width, and back to it
        if spec.embed_dim is not None:
            self.projections = self.matrix("project_in")[0], self.matrix("project_out")[0]
        self.layers: list[Layer] = []
        self.cache: Cache | None = None
        heads, width = (max(n) for n in zip(*((s.heads, s.heads + 2 * s.kv_heads) for s in spec.layers), strict=True))
        self.memory = Activations(spec.dim, width * spec.head_dim, heads, context)

    def matrix(self, role: str, layer: int = 0) -> Linear:
        """A module's weight, in the backend's form, and its bias or None."""
        name = self.spec.name(role, layer)
        return self.tensors[name + ".weight"], self._vector(name + ".bias")

    def vectors(self, role: str, layer: int = 0) -> Norm:
        """A norm's weight and its bias or None."""
        name = self.spec.name(role, layer)
        return self.backend.to_float32(self.tensors[name + ".weight"]), self._vector(name + ".bias")

    def bias(self, role: str, layer: int) -> np.ndarray | None:
        """The bias of a module whose weight may be on flash."""
        return self._vector(self.spec.name(role, layer) + ".bias")

    def _vector(self, name: str) -> np.ndarray | None:
        """As fp32: widening it for every token takes longer than using it."""
        found = self.tensors.get(name)
        return None if found is None else self.backend.to_float32(found)

    def norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
        if self.spec.table.norm == "layer":
            assert bias is not None
            return self.backend.layer_norm(x, weight, bias, self.spec.eps)
        return self.backend.rms_norm(x, weight, self.spec.eps)

    def make_cache(self) -> Cache:
        """An empty KV cache. There is memory for one: a cache that was made before must not be used any more."""
        if self.cache is None:
            new, size = self.backend.new_cache, self.spec.head_dim
            shapes = [(layer.kv_heads, self.context, size, self.dtype) for layer in self.spec.layers]
            self.cache = Cache([(new(*shape), new(*shape)) for shape in shapes])
        self.cache = Cache(self.cache.layers)
        return self.cache

    def __call__(self, ids: Sequence[int], cache: Cache) -> np.ndarray:
        """Run T new tokens; returns the logits (vocab,) fp32 after the last one.

        Raises UsageError when another reply has begun since: this model's memory holds one at a time.
        """
        if len(ids) > 1:
            with self.backend.products():
                return self._run(ids, cache)
        return self._run(ids, cache)

    def _run(self, ids: Sequence[int], cache: Cache) -> np.ndarray:
        if cache is not self.cache:
            raise UsageError("another reply began on this model since; finish one before the next, or load it twice")
        start, tokens = cache.length, np.asarray(ids, np.int64)
        x = self.backend.embed(self.embed, tokens)
        if self.projections is not None:
            x = self.backend.linear(x, self.projections[0], None)
        if self.positions is not None:
            x = x + self.backend.embed(self.positions, np.arange(start, start + len(tokens)) + OPT_POSITION_OFFSET)
        for layer in self.layers:
            x = layer(x, cache, start)
        cache.length = start + len(tokens)
        last = x[-1:] if self.last_norm is None else self.norm(x[-1:], *self.last_norm)
        if self.projections is not None:
            last = self.backend.linear(last, self.projections[1], None)
        return self.backend.linear(last, self.head, None)[0]


def build(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    backend: DecoderBackend,
    make_ffn: Callable[..., FFN],
    dtype: str,
    context: int,
) -> Decoder:
    """The decoder of a flash checkpoint: loads the dense part into pinned memory. Raises FormatError, ReadError."""
    shapes = resident_shapes(checkpoint, spec)
    tensors = load_tensors(checkpoint.resident_tensors(), shapes, backend.from_bytes)
    tensors = join_coded(tensors, resident_codings(checkpoint))
    decoder = Decoder(spec, backend, tensors, dtype, context)
    for index in range(len(spec.layers)):
        roles = ("up", "down", "gate") if spec.gated else ("up", "down")
        biases = [decoder.bias(role, index) for role in roles] if spec.ffn_bias else []
        decoder.layers.append(Layer(decoder, index, make_ffn(index, *biases)))
    return decoder


def prefill(model: Decoder, prompt_ids: Sequence[int], cache: Cache, prefill_chunk: int) -> np.ndarray:
    """Run a new prompt in chunks of `prefill_chunk`; returns the logits (vocab,) after it."""
    model.flash.shared.begin_reply()
    for begin in range(0, len(prompt_ids), prefill_chunk):
        with model.flash.shared.phase(decoding=False):
            logits = model(prompt_ids[begin : begin + prefill_chunk], cache)
    return logits


def decode(model: Decoder, token: int, cache: Cache) -> np.ndarray:
    """Run one more token of a reply; returns the logits (vocab,) after it."""
    with model.flash.shared.phase(decoding=True):
        return model([token], cache)


def steps(
    model: Decoder,
    prompt_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    prefill_chunk: int,
    prompt_cache: PromptCache | None = None,
) -> Iterator[int]:
    """Yield the ids of a reply, at most `max_tokens`. The prompt runs in chunks of `prefill_chunk` tokens, except for
    the tokens at its beginning that `prompt_cache` holds."""
    sample, last = make_sampler(sampling), prompt_cache or PromptCache()
    held = last.prefix_length(prompt_ids) if last.cache is not None and last.cache is model.cache else 0
    cache = last.cache if held else model.make_cache()
    cache.length, last.cache, last.ids = held, cache, list(prompt_ids[:held])
    logits = prefill(model, prompt_ids[held:], cache, prefill_chunk)
    last.ids = list(prompt_ids)
    for made in range(max_tokens):
        token = sample(logits)
        yield token
        if made + 1 < max_tokens:
            logits = decode(model, token, cache)
            last.ids.append(token)


def forced(
    model: Decoder, prompt_ids: Sequence[int], next_ids: Sequence[int], prefill_chunk: int
) -> Iterator[np.ndarray]:
    """Yield the logits (vocab,) fp32 after the prompt, then after each of `next_ids`."""
    cache = model.make_cache()
    yield prefill(model, prompt_ids, cache, prefill_chunk)
    for token in next_ids:
        yield decode(model, token, cache)


def keys_read(config: Mapping[str, Any]) -> frozenset[str]:
    """The keys of a config that the spec of a model is made from."""
    return OWN_MIXTURES if is_mixture(config) else OWN


def load_tokenizer(path: Path, eos_ids: Sequence[int]) -> Tokenizer:
    return load_tokenizer_files(path, eos_ids)
