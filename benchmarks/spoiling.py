"""Spoilt files, for `fuzz.py`: bytes, values of JSON, members of archives, files of a folder."""

import copy
import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Tree = dict[str, bytes]
"""Files of a folder by relative path."""

TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"1e999", b"99999999999999999999",
    b"null", b"true", b"NaN", b'"F32"', b'"a"', b"\xff", b"\0", b"\\u0000", b"\\ud800", b"\n",
    b"../", b"/etc/passwd", b" " * 50, b"[" * 3000, b"9" * 5000, b'{"a":' * 2000,
]  # fmt: skip
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 10**6, 2**31, 2**63, 10**30, -(10**400), 0.5, 1e308, float("nan"),
    float("inf"), "", " ", "a", "\ud800", "\0", "..", "/", "a" * 3000, [], {}, [[]], [None], [-1],
    [1, 2, 3], {"a": 1}, {"": None},
]  # fmt: skip


def mutated(
    text: bytes, rng: np.random.Generator, tokens: Sequence[bytes] = TOKENS
) -> bytes:
    """One to four edits: a byte changed, a stretch dropped or repeated, a token put in or over,
    the end cut off."""
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(text) + 1))
        length = int(rng.integers(1, 12))
        token = tokens[int(rng.integers(len(tokens)))]
        text = (
            text[:at] + bytes([int(rng.integers(256))]) + text[at + 1 :],
            text[:at] + text[at + length :],
            text[:at] + text[at : at + length] * 2 + text[at + length :],
            text[:at] + token + text[at:],
            text[:at] + token + text[at + len(token) :],
            text[:at],
        )[int(rng.integers(6))]
    return text


def mutated_value(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value of which one or two, somewhere, were replaced, removed or given twice."""
    value = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 3))):
        holders = [found for found in _containers(value) if found]
        if not holders:
            return _hostile(rng)
        holder = holders[int(rng.integers(len(holders)))]
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = keys[int(rng.integers(len(keys)))]
        kind = int(rng.integers(6))
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif kind == 1:
            holder[str(key) + "x"] = holder.pop(key)
        else:
            holder[key] = _hostile(rng)
    return value


def _containers(value: Any) -> list[Any]:
    if not isinstance(value, (dict, list)):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(found for one in inner for found in _containers(one))]


def _hostile(rng: np.random.Generator) -> Any:
    return copy.deepcopy(HOSTILE[int(rng.integers(len(HOSTILE)))])


def spoilt(name: str, content: bytes, rng: np.random.Generator) -> bytes:
    """A file with mistakes of its own kind (values of JSON, what a gzip file packs), or in any
    of its bytes."""
    if rng.random() < 0.4:
        return mutated(content, rng)
    if name.endswith((".tar", ".gz")):
        packed = name.endswith(".gz")
        content = gzip.decompress(content) if packed else content
        content = _spoilt_archive(content, rng) if rng.random() < 0.7 else mutated(content, rng)
        return gzip.compress(content, 1) if packed else content
    if name.endswith(".jsonl"):
        rows = mutated_value([json.loads(line) for line in content.splitlines()], rng)
        return b"\n".join(json.dumps(row).encode() for row in rows if isinstance(rows, list))
    try:
        value = json.loads(content)
    except ValueError:
        return mutated(content, rng)
    return json.dumps(mutated_value(value, rng)).encode()


def _spoilt_archive(content: bytes, rng: np.random.Generator) -> bytes:
    """A whole archive with one member spoilt, renamed, twice, or a link."""
    made = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar, tarfile.open(None, "w", made) as other:
        members = tar.getmembers()
        chosen = int(rng.integers(len(members)))
        for place, member in enumerate(members):
            packed = tar.extractfile(member)
            inside = b"" if packed is None else packed.read()
            if place == chosen:
                kind = int(rng.integers(4))
                if kind == 0:
                    other.addfile(member, io.BytesIO(inside))
                elif kind == 1:
                    member.name = mutated(member.name.encode(), rng).decode(errors="replace")
                elif kind == 2:
                    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                else:
                    inside = mutated(inside, rng)
                member.size = len(inside)
            other.addfile(member, io.BytesIO(inside))
    return made.getvalue()


def read_tree(folder: Path) -> Tree:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_spoilt(tree: Tree, folder: Path, rng: np.random.Generator, of: str = "") -> None:
    """Writes the files, of which one is spoilt, empty, missing, or a folder; it is one of those
    whose path begins with `of`."""
    names = [name for name in tree if name.startswith(of)]
    name = names[int(rng.integers(len(names)))]
    kind = rng.random()
    for other, content in tree.items():
        path = folder / other
        path.parent.mkdir(parents=True, exist_ok=True)
        if other != name:
            path.write_bytes(content)
        elif kind < 0.9:
            path.write_bytes(spoilt(name, content, rng))
        elif kind < 0.94:
            path.write_bytes(b"")
        elif kind < 0.97:
            path.mkdir()
