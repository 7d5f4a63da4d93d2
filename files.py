"""Files: named, written whole or not at all, read back, and those of an earlier run removed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO, TextIO

from config import InputError

DAMAGED_CHECKPOINT = (
    UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)
"""What ``torch.load`` was seen to raise for files that are cut, damaged or of another program, beside OSError."""
LONGEST_STEM = 220  # bytes; file systems take 255, and names are written with an ending and more


@contextlib.contextmanager
def whole_file(path: Path, sync: bool = False) -> Iterator[BinaryIO]:
    """A file to write into that is there whole or not at all, its folder made: a temporary one beside it, renamed where
    the block ends without an error.

    Args:
        sync: wait until the disk has it, so that not even a power cut leaves a part.

    Raises:
        InputError: the folder cannot be written or the disk is full; an older file at the path is kept.
    """
    part = path.with_name(f".{os.getpid()}.part-{zlib.crc32(path.name.encode('utf-8', 'surrogateescape')):08x}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise InputError(
            f"Cannot write {path}: {error.strerror or error}; expected a writable folder with room in it "
            "(--output-dir)."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_whole(path: Path, content: bytes | memoryview, sync: bool = False) -> None:
    """Write a file as ``whole_file`` does and raises."""
    with whole_file(path, sync) as file:
        file.write(content)


def write_json(path: Path, values: dict) -> None:
    """Write values as indented JSON, as ``write_whole`` does and raises; a number that is not finite becomes null."""
    text = json.dumps(values, indent=1)
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda name: None), indent=1)
    write_whole(path, f"{text}\n".encode(), sync=True)


def read_json(path: Path) -> dict:
    """The mapping in a JSON file; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class FileError(InputError):
    """One file of the user's cannot be used; ``reason`` says why, the message also names the file."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} {self.reason}."


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[TextIO]:
    """A CSV to write into, of whatever file names, its folder made; each row is in the file as soon as it is written.

    Raises:
        InputError: the folder cannot be made, or the disk is full.
    """
    make_folder(path.parent)
    try:
        with path.open("w", buffering=1, newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield file
    except OSError as error:
        no_room = error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        if not no_room and error.filename != str(path):  # of something else that the block is busy with
            raise
        raise InputError(f"Cannot write {path}: {error.strerror}.") from None


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; nothing where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def make_folder(folder: Path) -> None:
    """Make a folder of output, and those above it, where there is none.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The output folder {folder} cannot be made ({error.strerror or error}).") from None


def remove_written(out: Path, names: dict[str, re.Pattern], inputs: Iterable[Path] = ()) -> None:
    """Remove, in each folder below ``out``, the files of such names, what an earlier run left there, but none of the
    inputs.
    """
    kept = set(map(os.path.realpath, inputs))
    for folder, pattern in names.items():
        for path in list((out / folder).glob("*")):
            if pattern.fullmatch(path.name) and os.path.realpath(path) not in kept:
                path.unlink(missing_ok=True)


def short_stem(stem: str) -> str:
    """The stem; where it is very long its start and a mark of the whole of it, so that what is named after it can be
    written.
    """
    encoded = stem.encode("utf-8", "surrogateescape")
    if len(encoded) <= LONGEST_STEM:
        return stem
    return f"{encoded[: LONGEST_STEM - 9].decode('utf-8', 'ignore')}-{zlib.crc32(encoded):08x}"
