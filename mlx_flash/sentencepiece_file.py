"""Reads SentencePiece's tokenizer.model: a protobuf message of which a few fields are needed.

Owns the wire format, so that neither protobuf nor sentencepiece has to be installed. Refuses to tokenize.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # piece types
UNIGRAM = 1
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types


@dataclass
class SentencePieceModel:
    """pieces: (text, score, type), an id is a place; named: bos_token, eos_token, unk_token where defined."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    unigram: bool = True
    byte_fallback: bool = False
    unk_id: int = 0
    unk_piece: str = "<unk>"
    named: dict[str, str] = field(default_factory=dict)
    charsmap: bytes = b""


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """The model in a tokenizer.model file. Raises ValueError if it is not one."""
    model = SentencePieceModel()
    trainer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            model.pieces.append(_piece(_bytes(value)))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            model.charsmap = _bytes(dict(_fields(_bytes(value))).get(2, b""))
    if not model.pieces:
        raise ValueError("not a SentencePiece model: it has no pieces")
    model.unigram = trainer.get(3, UNIGRAM) == UNIGRAM
    model.byte_fallback = bool(trainer.get(35, 0))
    model.unk_id = _int(trainer.get(40, 0))
    model.unk_piece = _bytes(trainer.get(45, b"<unk>")).decode()
    for name, place, default_id, spelling, default in (
        ("unk_token", 40, 0, 45, b"<unk>"),
        ("bos_token", 41, 1, 46, b"<s>"),
        ("eos_token", 42, 2, 47, b"</s>"),
    ):
        if _int(trainer.get(place, default_id)) >= 0:
            model.named[name] = _bytes(trainer.get(spelling, default)).decode()
    return model


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode()
        elif number == 2:
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3:
            kind = _int(value)
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message: an int for a varint, else its bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, place = _varint(data, place)
            yield (
                number,
                value - (1 << 64) if value >> 63 else value,
            )  # negative numbers are 64-bit two's complement
            continue
        if wire == LENGTH:
            size, place = _varint(data, place)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"not a SentencePiece model: wire type {wire} at byte {place}")
        if place + size > len(data):
            raise ValueError(f"truncated: a field of {size} bytes at byte {place}, {len(data) - place} are left")
        yield number, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError(f"truncated inside a number at byte {place}")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError(f"not a SentencePiece model: a number of more than 10 bytes ends at byte {place}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    raise ValueError("not a SentencePiece model: a number where text belongs")


def _int(value: int | bytes) -> int:
    if isinstance(value, int):
        return value
    raise ValueError("not a SentencePiece model: text where a number belongs")
