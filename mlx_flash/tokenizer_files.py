"""Builds a `tokenizers` tokenizer from the files of a folder, with the result transformers 5 would have.

Owns the file formats (tokenizer.json, SentencePiece's tokenizer.model, vocab.json + merges.txt) and the rules
of which special tokens exist and what is put in front. Refuses to know prompts, chats and streaming.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from .detokenizer import SPACE
from .errors import ConfigError, FormatError
from .sentencepiece_file import CONTROL, USER_DEFINED, SentencePieceModel, parse_sentencepiece

# transformers takes tokenizer.json as it stands for these, whatever class the folder names.
AS_IT_STANDS = frozenset(
    {"mistral", "mixtral", "ministral", "ministral3", "mistral3", "phi3", "phimoe", "minicpm3", "nemotron"}
    | {"jamba", "internlm2", "internlm3", "granite", "granitemoe", "olmo2", "olmo3", "flex_olmo", "stablelm"}
    | {"glm", "glm4", "glm4_moe", "persimmon", "ernie4_5", "ernie4_5_moe", "minimax_m2"}
)
# transformers overrules the class that these name.
OVERRULED = {"qwen2": "Qwen2Tokenizer"}
# Special tokens a class has when the folder names none.
GPT2_TOKENS = {key: "<|endoftext|>" for key in ("bos_token", "eos_token", "unk_token")}
CLASS_TOKENS = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GPT2Tokenizer": GPT2_TOKENS,
    "GPTNeoXTokenizer": GPT2_TOKENS | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": {key: "<|endoftext|>" for key in ("eos_token", "unk_token", "pad_token")},
}
CLASS_OF_MODEL = {
    "opt": "GPT2Tokenizer",
    "gpt2": "GPT2Tokenizer",
    "phi": "GPT2Tokenizer",
    "starcoder2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "olmo": "GPTNeoXTokenizer",
    "olmoe": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "qwen3_next": "Qwen2Tokenizer",
}

Tokens = dict[str, str | AddedToken]
_REPLACE_BYTES_FUSE: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


@dataclass
class _Source:
    """What the vocabulary file says itself: `own` tokens by id; `named` and `extra` ones as defaults."""

    backend: Tokenizer
    own: dict[int, AddedToken] = field(default_factory=dict)
    named: Tokens = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)
    decides_bos: bool = False


def load_backend(folder: Path, settings: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of `folder` and its special tokens by name (bos_token, ...).

    `settings` is its tokenizer_config.json. Raises ConfigError if the folder holds no tokenizer, FormatError
    for a file that cannot be read.
    """
    source = _read_source(folder, _class_name(settings, read_json(folder / "config.json")), settings)
    backend = source.backend
    try:
        listed, settings = _listed_tokens(folder, settings, source.own)
        named = _named_tokens(settings, source.named)
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or source.extra
        _add_tokens(backend, listed, named, [] if isinstance(extra, Mapping) else map(_token, extra))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"cannot read the special tokens in {folder}: {type(error).__name__}: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    texts = {key: _text(token) for key, token in named.items()}
    if not source.decides_bos:
        _set_bos_and_eos(backend, settings, texts)
    return backend, texts


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is none. Raises FormatError for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path.name} holds a {type(value).__name__}; an object is expected")
    return value


def _class_name(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The transformers class that would read the folder, without "Fast"; "" = its files as they stand."""
    model = config.get("model_type") or ""
    if model in AS_IT_STANDS:
        return ""
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class") or CLASS_OF_MODEL.get(model, "")
    return OVERRULED.get(model, str(declared).removesuffix("Fast"))


def _read_source(folder: Path, name: str, settings: Mapping[str, Any]) -> _Source:
    readers: dict[str, Callable[[Path, str, Mapping[str, Any]], _Source]] = {
        "tokenizer.json": _read_tokenizer_json,
        "tokenizer.model": _read_sentencepiece,
        "vocab.json": _read_vocab_and_merges,
    }
    for file, read in readers.items():
        if (folder / file).is_file() and (file != "vocab.json" or (folder / "merges.txt").is_file()):
            try:
                return read(folder / file, name, settings)
            except Exception as error:  # the tokenizers library raises bare Exception for files it cannot parse
                raise FormatError(f"cannot read {folder / file}: {error}") from error
    raise ConfigError(
        f"no tokenizer in {folder} (tokenizer.json, tokenizer.model or vocab.json with merges.txt); "
        "convert again with --tokenizer FOLDER, for OpenELM a folder with the Llama 2 tokenizer"
    )


def _read_tokenizer_json(path: Path, name: str, settings: Mapping[str, Any]) -> _Source:
    text = path.read_text(encoding="utf-8")
    backend = Tokenizer.from_str(text)
    own = backend.get_added_tokens_decoder()
    if name == "LlamaTokenizer":
        spec = json.loads(text)
        if "ByteLevel" in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")]):
            name = ""  # a Llama 3 tokenizer under the name of the Llama 2 class
        else:
            # transformers keeps only vocabulary, merges and post-processor and builds the rest anew: text
            # that follows a special token then gets no space in front.
            vocab, merges = spec["model"]["vocab"], spec["model"].get("merges")
            if isinstance(vocab, list):
                vocab = {token: i for i, (token, _) in enumerate(vocab)}
            backend = _build(_llama_spec(vocab, merges, settings), spec.get("post_processor"))
    return _Source(backend, own, dict(CLASS_TOKENS.get(name, {})), decides_bos=True)


def _read_sentencepiece(path: Path, name: str, settings: Mapping[str, Any]) -> _Source:
    model = parse_sentencepiece(path.read_bytes())
    extra = [
        AddedToken(text, normalized=False, special=kind == CONTROL)
        for text, _, kind in model.pieces
        if kind in (CONTROL, USER_DEFINED)
    ]
    if name == "LlamaTokenizer":
        vocab = {text: i for i, (text, _, _) in enumerate(model.pieces)}
        named: Tokens = dict(CLASS_TOKENS[name])
        return _Source(_build(_llama_spec(vocab, None, settings)), named=named, extra=extra)
    return _Source(_build(_plain_sentencepiece_spec(model)), named=dict(model.named), extra=extra)


def _read_vocab_and_merges(path: Path, name: str, settings: Mapping[str, Any]) -> _Source:
    vocab = json.loads(path.read_text(encoding="utf-8"))
    lines = (path.parent / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.rstrip() for line in lines if line.strip() and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return _Source(_build(spec), named=dict(CLASS_TOKENS.get(name, GPT2_TOKENS)))


def _build(spec: Mapping[str, Any], post_processor: Any = None) -> Tokenizer:
    base: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
    }
    return Tokenizer.from_str(json.dumps(base | {"post_processor": post_processor} | dict(spec)))


def _llama_spec(vocab: dict[str, int], merges: list[Any] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    prefix = settings.get("add_prefix_space")
    scheme = "never" if prefix is False else "always" if settings.get("legacy", False) else "first"
    steps = [
        *_REPLACE_BYTES_FUSE,
        *([] if prefix is False else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]),
    ]
    return {
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": scheme,
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": make_merges(vocab) if merges is None else merges,
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _plain_sentencepiece_spec(model: SentencePieceModel) -> dict[str, Any]:
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if model.charsmap:
        coded = base64.b64encode(model.charsmap).decode()
        normalizers.insert(0, {"type": "Precompiled", "precompiled_charsmap": coded})
    decoder = _REPLACE_BYTES_FUSE if model.byte_fallback else _REPLACE_BYTES_FUSE[:1]
    core: dict[str, Any] = {"byte_fallback": model.byte_fallback}
    if model.unigram:
        core |= {
            "type": "Unigram",
            "unk_id": model.unk_id,
            "vocab": [[text, score] for text, score, _ in model.pieces],
        }
    else:
        vocab = {text: i for i, (text, _, _) in enumerate(model.pieces)}
        core |= {"type": "BPE", "vocab": vocab, "merges": make_merges(vocab), "fuse_unk": True}
        core["unk_token"] = model.unk_piece
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": core,
    }


def make_merges(vocab: Mapping[str, int]) -> list[list[str]]:
    """BPE merges of a vocabulary that lists none (SentencePiece): every split of a piece, in order of ids."""
    merges = []
    for piece, _ in sorted(vocab.items(), key=lambda item: item[1]):
        for cut in range(1, len(piece)):
            if piece[:cut] in vocab and piece[cut:] in vocab:
                merges.append([piece[:cut], piece[cut:]])
    return merges


def _listed_tokens(
    folder: Path, settings: Mapping[str, Any], own: dict[int, AddedToken]
) -> tuple[dict[int, AddedToken], Mapping[str, Any]]:
    """Added tokens by id, and the settings with special_tokens_map.json where that counts (older folders)."""
    if "added_tokens_decoder" in settings:
        return {int(i): _token(token) for i, token in settings["added_tokens_decoder"].items()}, settings
    special = read_json(folder / "special_tokens_map.json")
    settings = dict(settings) | {k: _token(v, True) if isinstance(v, Mapping) else v for k, v in special.items()}
    added = read_json(folder / "added_tokens.json")
    names = {_text(v) for k, v in settings.items() if k.endswith("_token") and isinstance(v, (str, AddedToken))}
    listed = {i: AddedToken(text, normalized=text not in names, special=text in names) for text, i in added.items()}
    return listed | own, settings


def _named_tokens(settings: Mapping[str, Any], defaults: Tokens) -> Tokens:
    found: dict[str, Any] = {key: value for key, value in settings.items() if key.endswith("_token")}
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(settings.get(group), Mapping):
            found |= settings[group]
    named = dict(defaults)
    for key, value in found.items():
        named.pop(key, None)
        if isinstance(value, (str, AddedToken, Mapping)):
            named[key] = _token(value)
    return named


def _add_tokens(
    backend: Tokenizer, listed: Mapping[int, AddedToken], named: Tokens, extra: Iterable[str | AddedToken]
) -> None:
    """Adds what the vocabulary file lacks, in transformers' order: it decides new ids and whose flags win."""
    present = backend.get_added_tokens_decoder().values()
    same = {repr(token) for token in present}
    new = [token for _, token in sorted(listed.items(), key=lambda item: item[0]) if repr(token) not in same]
    texts = {token.content for token in [*present, *new]}
    for value in [*named.values(), *extra]:
        token = AddedToken(value, special=True) if isinstance(value, str) else value
        # A second spelling of one text is kept: the library lets the last one's flags win.
        if token.content not in texts and token not in new:
            new.append(token)
    names = {_text(token) for token in named.values()}
    for token in new:
        token.special = token.special or token.content in names
    backend.add_tokens(new)


def _set_bos_and_eos(backend: Tokenizer, settings: Mapping[str, Any], named: Mapping[str, str]) -> None:
    ends = [settings.get(f"add_{end}_token") and named.get(f"{end}_token") for end in ("bos", "eos")]
    if not any(ends):
        return
    template = [f"{ends[0]}:0"] * bool(ends[0]) + ["$A:0"] + [f"{ends[1]}:0"] * bool(ends[1])
    ids = [(token, backend.token_to_id(token)) for token in ends if token]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=ids)


def _token(value: Any, special: bool | None = None) -> Any:
    if not isinstance(value, Mapping):
        return value
    flags = {k: v for k, v in value.items() if k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(value["content"], **(flags if special is None else flags | {"special": special}))


def _text(token: str | AddedToken) -> str:
    return token if isinstance(token, str) else token.content
