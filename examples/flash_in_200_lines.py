"""The idea of "LLM in a flash" (arXiv 2312.11514) on one page of NumPy, with the same tokens as mlx_flash.

The feed-forward networks (FFNs) hold most of a model's weights, and with ReLU nearly all of their neurons are zero for
any one token. So FFNs can stay on disk: a token reads only the neurons that it needs and that are not in memory yet.
"""

import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np


# 1. THE MODEL FILE. Section 2 of the paper: a model is stored in flash and runs from DRAM. In the engine: storage.
# A safetensors file is a header's length (8 bytes), the header (JSON), the numbers. NumPy takes bfloat16 as uint16.
def read_tensors(path):
    data, tensors = path.read_bytes(), {}
    start = 8 + int.from_bytes(data[:8], "little")
    for name, info in json.loads(data[8:start]).items():
        if name != "__metadata__":
            dtype, (begin, end) = {"BF16": np.uint16, "F32": np.float32}[info["dtype"]], info["data_offsets"]
            tensors[name] = np.frombuffer(data[start + begin : start + end], dtype).reshape(info["shape"])
    return tensors


def widen(raw):  # to float32: a bfloat16 is the upper half of one
    return (raw.astype(np.uint32) << 16).view(np.float32) if raw.dtype == np.uint16 else raw.astype(np.float32)


# 2. BUNDLES. Section 3.2 (bundling columns and rows): all that a neuron needs lies together, so that one read brings
# it. In the engine: storage, which also reads neighbors in one piece, and many pieces at once.
class Bundles:
    def __init__(self, path, gate, up, down, counts):  # (n, d), (n, d), (d, n)
        np.stack([gate, up, down.T], axis=1).tofile(path)  # n records [gate row | up row | down column]
        self.path, self.counts = path, counts
        self.width, self.dtype, self.row_bytes = gate.shape[1], gate.dtype, gate[0].nbytes

    def read(self, ids):
        """Up rows and down columns, (n, 2, d). Gate rows, the first third of each record, are in memory (see 4)."""
        rows, size = np.empty((len(ids), 2, self.width), self.dtype), 2 * self.row_bytes
        with open(self.path, "rb", buffering=0) as file:
            for row, offset in zip(rows, (3 * ids + 1) * self.row_bytes, strict=True):
                if hasattr(os, "pread"):
                    data = os.pread(file.fileno(), size, offset)
                else:  # Windows
                    file.seek(offset)
                    data = file.read(size)
                row[:] = np.frombuffer(data, self.dtype).reshape(row.shape)
        self.counts["bytes"] += rows.nbytes
        return rows


# 3. THE WINDOW. Sections 3.1 (sliding window) and 3.3 (memory is allocated once): successive tokens need much the same
# neurons, so those used last keep their slots. In the engine: residency, which has better rules for what is evicted.
class Window:
    def __init__(self, bundles, neurons, capacity):
        self.bundles, self.token = bundles, 0
        self.slab = np.empty((capacity, 2, bundles.width), bundles.dtype)  # a slot: up row, down column
        self.slot_of = np.full(neurons + 1, -1)  # the last item stands for id -1, which empty slots have
        self.id_of, self.last_used = np.full(capacity, -1), np.zeros(capacity, int)  # last used by which token

    def fetch(self, ids):
        """Read those of `ids` that are missing. Returns the slot of each, -1 where all slots hold others of `ids`."""
        self.token += 1
        slots = self.slot_of[ids]
        missing = np.flatnonzero(slots < 0)
        self.bundles.counts.update(hits=len(ids) - len(missing), misses=len(missing))
        self.last_used[slots[slots >= 0]] = self.token  # first, so that nothing this token needs is evicted

        victims = np.argsort(self.last_used, kind="stable")
        victims = victims[self.last_used[victims] < self.token][: len(missing)]
        missing = missing[: len(victims)]
        self.slot_of[self.id_of[victims]] = -1
        self.slot_of[ids[missing]] = slots[missing] = victims
        self.id_of[victims], self.last_used[victims] = ids[missing], self.token
        self.slab[victims] = self.bundles.read(ids[missing])
        return slots

    def rows(self, ids, slots):
        """Up rows and down columns, (n, d) each: from the slots, or straight from disk for ids that have none."""
        raw, here = np.empty((len(ids), *self.slab.shape[1:]), self.slab.dtype), slots >= 0
        raw[here] = self.slab[slots[here]]
        raw[~here] = self.bundles.read(ids[~here])
        return widen(raw[:, 0]), widen(raw[:, 1])


# 4. SELECTION. Section 3.1 (ReLU sparsity): y = sum of relu(gate_i . x) * (up_i . x) * down_i. Gate rows stay in
# memory; where gate_i . x is not positive, the term is zero and neuron i is not read. In the engine: selection, where
# this is `gate`; `predictor` is the paper's way, which guesses what is positive from a smaller matrix.
def ffn(x, gate_rows, window):  # (d,) -> (d,)
    gate = gate_rows @ x
    ids = np.flatnonzero(gate > 0)
    slots = window.fetch(ids)
    # Blocks of 256 ids, eight segments of blocks, then a tree: an order that slots do not change, so neither do bits.
    sums, blocks = np.zeros((8, len(x)), np.float32), -(-len(gate) // 256)
    for block in range(blocks):
        here = ids // 256 == block
        up, down = window.rows(ids[here], slots[here])
        sums[block * 8 // blocks] += (gate[ids[here]] * (up @ x)) @ down
    while len(sums) > 1:
        sums = sums[::2] + sums[1::2]
    return sums[0]


# 5. THE DECODER. Section 3.1 (selective persistence): embeddings, attention and norms, which every token uses, stay in
# memory. In the engine: models. This is OpenELM, one token at a time.
class Decoder:
    def __init__(self, model_dir, folder, capacity, context, counts):
        self.config = json.loads((model_dir / "config.json").read_text())
        assert self.config["activation_fn_name"] == "relu", "without zeros there is nothing to leave out"
        tensors = read_tensors(model_dir / "model.safetensors")
        tensors = {name[len("transformer.") : -len(".weight")]: raw for name, raw in tensors.items()}
        self.gates, self.windows, self.caches, self.position = [], [], [], 0
        for i, kv_heads in enumerate(self.config["num_kv_heads"]):
            (gate, up), down = np.split(tensors.pop(f"layers.{i}.ffn.proj_1"), 2), tensors.pop(f"layers.{i}.ffn.proj_2")
            self.gates.append(widen(gate))
            self.windows.append(Window(Bundles(folder / f"layer-{i}", gate, up, down, counts), len(gate), capacity))
            self.caches.append(np.zeros((2, kv_heads, context, self.config["head_dim"]), np.float32))  # keys, values
        self.weights, self.is_bf16 = {name: widen(raw) for name, raw in tensors.items()}, gate.dtype == np.uint16

    def __call__(self, token):  # -> logits (vocabulary,) of what follows it
        x = self.weights["token_embeddings"][token]
        for i, (gate, window) in enumerate(zip(self.gates, self.windows, strict=True)):
            x = x + self.attend(i, self.norm(f"layers.{i}.attn_norm", x))
            x = x + ffn(self.norm(f"layers.{i}.ffn_norm", x), gate, window)
        self.position += 1
        return self.weights["token_embeddings"] @ self.norm("norm", x)

    def norm(self, name, x):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config["rms_norm_eps"]) * self.weights[name]

    def rotate(self, x):  # rotary position embedding; x (heads, size)
        a, b = np.split(x, 2, axis=1)
        angle = self.position * self.config["rope_freq_constant"] ** (-np.arange(a.shape[1]) / a.shape[1])
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    def attend(self, i, x):  # (d,) -> (d,)
        name, cache = f"layers.{i}.attn", self.caches[i]
        _, kv_heads, _, size = cache.shape
        q, k, v = np.split((self.weights[f"{name}.qkv_proj"] @ x).reshape(-1, size), [-2 * kv_heads, -kv_heads])
        q, k = self.rotate(self.norm(f"{name}.q_norm", q)), self.rotate(self.norm(f"{name}.k_norm", k))
        bits = np.stack([k, v]).view(np.uint32)
        if self.is_bf16:  # the cache has the precision of the weights: rounded to the nearest, ties to even
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        cache[:, :, self.position] = bits.view(np.float32)
        keys, values = cache[:, :, : self.position + 1]  # (kv_heads, tokens, size) each
        scores = (q * np.float32(size**-0.5)).reshape(kv_heads, -1, size) @ keys.swapaxes(1, 2)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = scores @ values / scores.sum(axis=-1, keepdims=True)
        return self.weights[f"{name}.out_proj"] @ attended.reshape(-1)


# 6. TEXT. Byte-level BPE: the bytes of a word are joined pair by pair, the pair with the lowest id first.
def read_vocabulary(path):
    """The id of every token, by its bytes. In the file each byte is a letter: if printable, itself."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = dict(zip(map(chr, shown + [*range(256, 324)]), shown + sorted({*range(256)} - {*shown}), strict=True))
    vocab = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    return {bytes(byte_of[letter] for letter in token): i for token, i in vocab.items()}


def encode(text, vocab):  # words are those of GPT-2's pattern, but for numerals such as ½
    ids = [vocab[b"<s>"]]
    for word in re.findall(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text):
        parts = [bytes([byte]) for byte in word.encode()]
        while pairs := [(vocab[p], i) for i in range(len(parts) - 1) if (p := parts[i] + parts[i + 1]) in vocab]:
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [vocab[part] for part in parts]
    return ids


# 7. A STORY. Section 4: what is read for each token, and how much of it was in memory. In the engine: generation.
def generate(model_dir, prompt_ids, max_tokens, capacity, counts=None):
    """Greedy ids after `prompt_ids`, the same with any `capacity` (slots per layer). counts: gets what was read."""
    counts = Counter() if counts is None else counts
    with tempfile.TemporaryDirectory() as folder:
        decoder = Decoder(model_dir, Path(folder), capacity, len(prompt_ids) + max_tokens, counts)
        for token in prompt_ids:
            logits = decoder(token)
        reply = []
        counts.clear()
        counts["ffn_bytes"] = sum(path.stat().st_size for path in Path(folder).iterdir())
        while len(reply) < max_tokens and (token := int(np.argmax(logits))) != decoder.config["eos_token_id"]:
            reply.append(token)
            logits = decoder(token)
    return reply


if __name__ == "__main__":
    model_dir = Path(__file__).resolve().parents[1] / "models" / "flash-stories-6m"
    vocab, prompt, counts = read_vocabulary(model_dir / "tokenizer.json"), "Once upon a time there was a", Counter()
    reply = generate(model_dir, encode(prompt, vocab), max_tokens=80, capacity=256, counts=counts)
    print(prompt + b"".join(list(vocab)[i] for i in reply).decode())
    read, hit_rate = counts["bytes"] / len(reply), counts["hits"] / (counts["hits"] + counts["misses"])
    print(f"{read / 1e3:.0f} kB read per token, FFNs of {counts['ffn_bytes'] / 1e3:.0f} kB, hit rate {hit_rate:.0%}")
