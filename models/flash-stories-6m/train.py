"""Train the default model: an OpenELM-shaped decoder with a ReLU-gated FFN, pushed towards exact zeros.

    python train.py --stories DIR --out DIR [--steps N]      DIR holds train/*.txt and held/*.txt, a paragraph a line

    python train.py --out DIR --record FILE.npz               logits of the finished model, for the runtime's tests

Resumable: run the same command again. The rate is constant until the last `--decay` of the steps, so `--steps` may be
changed while training. Needs torch, tokenizers, safetensors, numpy; runs on a CPU or a CUDA GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

BOS, EOS = "<s>", "</s>"


def make_divisible(value: float, divisor: int) -> int:
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def make_config(dim: int = 256, layers: int = 8, head_dim: int = 32, vocab: int = 4096, context: int = 512) -> dict:
    """OpenELM's layer-wise scaling: attention grows from 0.5 to 1 times the width, the FFN from 0.5 to 4 times."""
    qkv = [round(float(m), 2) for m in np.linspace(0.5, 1.0, layers)]
    ffn = [round(float(m), 2) for m in np.linspace(0.5, 4.0, layers)]
    heads = [make_divisible(dim * m, head_dim * 4) // head_dim for m in qkv]
    return {
        "architectures": ["OpenELMForCausalLM"],
        "model_type": "openelm",
        "activation_fn_name": "relu",
        "model_dim": dim,
        "num_transformer_layers": layers,
        "head_dim": head_dim,
        "num_gqa_groups": 4,
        "num_query_heads": heads,
        "num_kv_heads": [h // 4 for h in heads],
        "qkv_multipliers": [0.5, 1.0],
        "ffn_multipliers": ffn,
        "ffn_dim_divisor": 256,
        "ffn_with_glu": True,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "normalization_layer_name": "rms_norm",
        "rms_norm_eps": 1e-6,
        "rope_freq_constant": 10000,
        "max_context_length": context,
        "rope_max_length": 2 * context,
        "vocab_size": vocab,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        "initializer_range": 0.02,
    }


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rotate(x, cos, sin):  # x (B, H, T, head_dim), half-split
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: dict, layer: int):
        super().__init__()
        dim, self.head_dim = config["model_dim"], config["head_dim"]
        self.heads, self.kv_heads = config["num_query_heads"][layer], config["num_kv_heads"][layer]
        eps = config["rms_norm_eps"]
        self.qkv_proj = nn.Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.heads * self.head_dim, dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim, eps), RMSNorm(self.head_dim, eps)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        qkv = self.qkv_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, config: dict, layer: int):
        super().__init__()
        dim = config["model_dim"]
        hidden = make_divisible(config["ffn_multipliers"][layer] * dim, config["ffn_dim_divisor"])
        self.proj_1, self.proj_2 = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        gate, up = self.proj_1(x).chunk(2, dim=-1)
        gate = F.relu(gate)
        self.l1, self.zeros, self.neurons = gate.float().mean(), (gate == 0).float().mean().detach(), gate.shape[-1]
        return self.proj_2(gate * up)


class Block(nn.Module):
    def __init__(self, config: dict, layer: int):
        super().__init__()
        self.attn, self.ffn = Attention(config, layer), FeedForward(config, layer)
        dim, eps = config["model_dim"], config["rms_norm_eps"]
        self.attn_norm, self.ffn_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.token_embeddings = nn.Embedding(config["vocab_size"], config["model_dim"])
        self.layers = nn.ModuleList(Block(config, i) for i in range(config["num_transformer_layers"]))
        self.norm = RMSNorm(config["model_dim"], config["rms_norm_eps"])


class OpenELM(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config, self.transformer = config, Transformer(config)
        half = config["head_dim"] // 2
        inverse = config["rope_freq_constant"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(config["max_context_length"], dtype=torch.float64)[:, None] * inverse
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        scale = 1 / math.sqrt(2 * config["num_transformer_layers"])
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                last = name.endswith(("out_proj.weight", "proj_2.weight"))
                nn.init.normal_(weight, std=0.02 * (scale if last else 1))

    def forward(self, ids):
        x, length = self.transformer.token_embeddings(ids), ids.shape[1]
        for block in self.transformer.layers:
            x = block(x, self.cos[:length], self.sin[:length])
        return F.linear(self.transformer.norm(x), self.transformer.token_embeddings.weight)

    def activations(self):
        """Mean gate activation and fraction of exact zeros over all FFN neurons of the last forward pass."""
        ffns = [block.ffn for block in self.transformer.layers]
        total = sum(f.neurons for f in ffns)
        return sum(f.l1 * f.neurons for f in ffns) / total, sum(f.zeros * f.neurons for f in ffns) / total


def make_tokenizer(files: list[Path], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(f) for f in files], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0), (EOS, 1)])
    return tokenizer


def load_tokens(stories: Path, out: Path, vocab: int):
    """(train ids, positions where a paragraph starts, [(held ids, bytes)]), tokenised once into `out`."""
    path = out / "tokenizer.json"
    files = sorted((stories / "train").glob("*.txt"))
    if not path.exists():
        make_tokenizer(files, vocab).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))

    def encode(file: Path):
        return tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False).ids

    cache = out / "train.npy"
    if not cache.exists():
        np.save(cache, np.concatenate([np.array([*encode(f), 1], np.uint16) for f in files]))
    train = np.load(cache)
    newline = [i for i in range(vocab) if "\n" in tokenizer.decode([i])]
    starts = np.flatnonzero(np.isin(train, newline)) + 1
    held = [(np.array(encode(f)), f.stat().st_size) for f in sorted((stories / "held").glob("*.txt"))]
    return train, starts, held


def sample_batch(train, starts, step: int, batch: int, context: int):
    """Windows that begin at a paragraph, behind BOS; the step alone decides which, so a resumed run sees the same."""
    rng = np.random.default_rng((1234, step))
    at = rng.choice(starts[starts < len(train) - context - 1], batch)
    ids = np.stack([np.concatenate([[0], train[a : a + context]]) for a in at]).astype(np.int64)
    return torch.from_numpy(ids)


@torch.no_grad()
def evaluate(model, held, device, context=128, scored=256, most_windows=None):
    """(bits per byte, nats per token, fraction of zeros): BOS and `context` tokens unscored, the next `scored` scored.

    The first window of a book scores its context too, so that every token of a book is scored exactly once.
    """
    model.eval()
    nats = tokens = size = zeros = weight = 0.0
    for ids, byte_count in held:
        begins = list(range(0, len(ids) - 1, scored))
        begins = begins[:: max(1, len(begins) // most_windows)] if most_windows else begins
        book_tokens = 0
        for begin in begins:
            first = max(0, begin - context)
            window = np.concatenate([[0], ids[first : begin + scored]])
            batch = torch.from_numpy(window.astype(np.int64))[None].to(device)
            logits = model(batch[:, :-1]).float()
            losses = F.cross_entropy(logits[0], batch[0, 1:], reduction="none")[begin - first :]
            nats, book_tokens = nats + losses.sum().item(), book_tokens + len(losses)
            zeros, weight = zeros + model.activations()[1].item() * len(losses), weight + len(losses)
        tokens, size = tokens + book_tokens, size + byte_count * book_tokens / len(ids)
    model.train()
    return nats / size / math.log(2), nats / tokens, zeros / weight


def rate_at(step: int, steps: int, warmup: int, decay: float) -> float:
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (decay * steps)))


def target_zeros(step: int, steps: int, target: float) -> float:
    """The zeros asked for at a step: half (what a new model has) rising to the target over the first half."""
    return 0.5 + (target - 0.5) * min(1.0, step / (0.5 * steps))


def make_optimizers(model, rate: float):
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or "embeddings" in n]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def save_folder(model, out: Path) -> None:
    """The Hugging Face folder: bf16 weights, config; the tokenizer is there already."""
    state = {k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config["max_context_length"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


@torch.no_grad()
def record(folder: Path, file: Path, lengths: tuple[int, ...] = (1, 17, 300), new_tokens: int = 100) -> None:
    """Write prompts (a text the model samples, cut at `lengths`), the fp32 logits after each, and its greedy reply."""
    model = OpenELM(json.loads((folder / "config.json").read_text())).eval()
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    generator, ids = torch.Generator().manual_seed(1), [0]
    while len(ids) < max(lengths):
        weights = torch.softmax(model(torch.tensor([ids]))[0, -1] / 0.8, 0)
        ids.append(int(torch.multinomial(weights, 1, generator=generator)))
    arrays = {}
    for length in lengths:
        reply = list(ids[:length])
        logits = [model(torch.tensor([reply]))[0, -1]]
        for _ in range(new_tokens):
            reply.append(int(logits[-1].argmax()))
            logits.append(model(torch.tensor([reply]))[0, -1])
        arrays[f"prompt_{length}"] = np.array(ids[:length], np.int32)
        arrays[f"reply_{length}"] = np.array(reply[length:], np.int32)
        arrays[f"logits_{length}"] = logits[0].numpy()
        best = torch.stack(logits[:-1]).topk(2).values
        arrays[f"margins_{length}"] = (best[:, 0] - best[:, 1]).numpy()
    np.savez_compressed(file, **arrays)


class Log:
    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            path.write_text("step,tokens,seconds,loss,l1_weight,zeros,held_bits_per_byte,held_zeros\n")

    def write(self, **row):
        line = ",".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values())
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def train_step(model, forward, optimizers, batch, device, l1_weight: float):
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = forward(batch[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    l1, zeros = model.activations()
    (loss + l1_weight * l1).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item(), zeros.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the steps over which the rate falls to 0")
    parser.add_argument("--zeros", type=float, default=0.91, help="fraction of exact zeros to reach; 0 turns L1 off")
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the finished model's logits and stop")
    args = parser.parse_args()
    if args.record:
        return record(args.out, args.record)
    if args.stories is None:
        parser.error("--stories is needed for training")

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    config = make_config()
    train, starts, held = load_tokens(args.stories, args.out, config["vocab_size"])
    model = OpenELM(config).to(device)
    optimizers = make_optimizers(model, args.rate)
    step, l1_weight, seconds, checkpoint = 0, 1e-3, 0.0, args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, l1_weight, seconds = state["step"], state["l1_weight"], state["seconds"]
    forward = torch.compile(model) if args.compile else model
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(train):,} tokens, {len(starts):,} paragraphs, from step {step}", flush=True)

    log, begin, context = Log(args.out / "log.csv"), time.time() - seconds, config["max_context_length"]
    while step < args.steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * rate_at(step, args.steps, args.warmup, args.decay)
        batch = sample_batch(train, starts, step, args.batch, context)
        loss, zeros = train_step(model, forward, optimizers, batch, device, l1_weight if args.zeros else 0.0)
        # The weight follows the zeros asked for: it grows while there are too few, and shrinks where there are enough.
        l1_weight *= math.exp(0.05 * max(-1.0, min(1.0, 10 * (target_zeros(step, args.steps, args.zeros) - zeros))))
        l1_weight = max(1e-4, min(3.0, l1_weight))
        step += 1
        if step % 20 == 0 or step == args.steps:
            bits = held_zeros = ""
            if step % args.eval_every == 0 or step == args.steps:
                bits, _, held_zeros = evaluate(model, held, device, most_windows=None if step == args.steps else 40)
                state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
                state |= {"step": step, "l1_weight": l1_weight, "seconds": time.time() - begin}
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
            log.write(step=step, tokens=step * args.batch * context, seconds=round(time.time() - begin), loss=loss,
                      l1_weight=l1_weight, zeros=zeros, bits=bits, held_zeros=held_zeros)  # fmt: skip
    save_folder(model, args.out)


if __name__ == "__main__":
    main()
