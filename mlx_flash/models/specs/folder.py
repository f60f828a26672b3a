"""The files of a Hugging Face checkpoint folder: which of them hold the weights, and where links lead.

Folders of another kind (GGUF, pickles, NumPy archives, Git LFS pointers) are refused by name, with what to do. A link
in a folder that the user names may lead anywhere; a name that is read from a file may not leave the folder. Reads no
tensors.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from mlx_flash.engine.storage.json_file import read_json
from mlx_flash.engine.storage.lfs_pointer import is_pointer, pointer_problem
from mlx_flash.engine.storage.writer import is_safe_name
from mlx_flash.errors import FormatError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model*.safetensors"  # what mlx-lm loads
NUMBERED = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
GGUF = (
    "GGUF, the format of llama.cpp, which is not read here; take the repository that it was made from, whose weights "
    "are safetensors, or run it with llama.cpp"
)


def leads_somewhere(path: Path) -> bool:
    """Whether something exists at a path. Raises OSError or ValueError for a name that no file can have (too long, a
    NUL), on which `Path.exists` is silent from Python 3.14 on."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    return True


def is_plain(name: str) -> bool:
    """Whether a name that was read from a file names a file of the same folder, without saying where links lead."""
    return is_safe_name(name) and "/" not in name


def is_there(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of this name, even a link that leads nowhere."""
    return os.path.lexists(folder / name)


def safe_file(folder: Path, name: str) -> Path:
    """`folder/name`, an existing regular file, wherever links lead.

    Raises FormatError naming the file: for a name with a path in it, for links that lead nowhere or in a circle, for
    what is no file, and for a Git LFS pointer.
    """
    if not is_plain(name):
        raise FormatError(f"{folder}: the file name {name!r} points outside the folder")
    path = folder / name
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _not_there(folder, path, error) from None
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path} is not a regular file")
    if is_pointer(path):
        raise FormatError(pointer_problem(path))
    return path


def _not_there(folder: Path, path: Path, error: OSError) -> FormatError:
    if not path.is_symlink():
        reason = "" if error.errno == errno.ENOENT else f" ({error.strerror})"
        return FormatError(f"{folder} lacks {path.name}{reason}")
    if error.errno == errno.ELOOP:
        return FormatError(f"{path} is a link that leads back to itself; put the file itself there")
    reason = "which does not exist" if error.errno == errno.ENOENT else f"which cannot be opened: {error.strerror}"
    return FormatError(f"{path} is a link to {os.readlink(path)}, {reason}")


def refuse_other_formats(folder: Path) -> None:
    """Raise FormatError for a folder without a safetensors file that holds the weights in another format. Says nothing
    of a folder without weights."""
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.gguf")):
        raise FormatError(f"{folder} has its weights as {GGUF}")
    if any(path for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
        raise FormatError(
            f"{folder} has its weights in PyTorch's pickle format only, which can run code when read; "
            "convert them to safetensors first (transformers: save_pretrained)"
        )
    if any(folder.glob("*.npz")):
        raise FormatError(
            f"{folder} has its weights as .npz, the format of old releases of MLX; convert the original model again "
            "(mlx_lm.convert), or take a newer repository of it"
        )


def refuse_file(path: Path) -> None:
    """Raise FormatError for a file of weights in place of a folder, if its format is recognised."""
    try:
        with open(path, "rb") as file:
            gguf = file.read(4) == b"GGUF"
    except OSError:
        gguf = False
    if gguf or path.suffix.lower() == ".gguf":
        raise FormatError(f"{path} is {GGUF}")


def weight_files(folder: Path) -> dict[str, Path]:
    """The safetensors files of a checkpoint by name, each there: model.safetensors; else those that the index names;
    else, without an index, all that are called model*.safetensors. Raises FormatError naming the missing ones."""
    if is_there(folder, WEIGHTS):
        return {WEIGHTS: safe_file(folder, WEIGHTS)}
    if not has_index(folder):
        return _without_index(folder)
    names = sorted(set(read_index(folder).values()))
    missing = [name for name in names if is_plain(name) and not is_there(folder, name)]
    if missing:
        raise FormatError(f"{folder} lacks {len(missing)} of {len(names)} shards: {first_names(missing)}")
    return {name: safe_file(folder, name) for name in names}


def has_index(folder: Path) -> bool:
    """Whether the folder's weights are those that an index names."""
    return not is_there(folder, WEIGHTS) and is_there(folder, INDEX)


def read_index(folder: Path) -> dict[str, str]:
    """The shard of each tensor by the folder's index. Raises FormatError."""
    values = read_json(safe_file(folder, INDEX)).get("weight_map")
    if not isinstance(values, dict) or not values or not all(isinstance(name, str) for name in values.values()):
        raise FormatError(f"{folder / INDEX} has no usable 'weight_map'")
    return values


def _without_index(folder: Path) -> dict[str, Path]:
    names = sorted(path.name for path in folder.glob(SHARDS))
    if not names:
        refuse_other_formats(folder)
        raise FormatError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    numbers = [match for name in names if (match := NUMBERED.fullmatch(name))]
    totals = sorted({int(match[2]) for match in numbers})
    if len(totals) > 1:
        raise FormatError(
            f"{folder} has no {INDEX}, and shards of several models: of {' and of '.join(map(str, totals))}"
        )
    there = {int(match[1]) for match in numbers}
    if numbers and len(there) != totals[0]:
        width = len(numbers[0][1])
        # Not one by one: a name may claim any number of them.
        missing = [i for i in range(1, min(totals[0], len(there) + 5) + 1) if i not in there]
        named = [f"model-{i:0{width}}-of-{totals[0]:0{width}}.safetensors" for i in missing]
        count = totals[0] - len(there)
        raise FormatError(f"{folder} lacks {count} of {totals[0]} shards: {first_names(named, count)}")
    return {name: safe_file(folder, name) for name in names}


def first_names(names: list[str], count: int | None = None) -> str:
    """The first five of many names, for a message. count: of all, where `names` are not all."""
    count = len(names) if count is None else count
    return ", ".join(names[:5]) + (f" and {count - 5} more" if count > 5 else "")
