"""What `fuzz.py` spoils, and how each is loaded."""

import copy
import csv
import io
import json
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from spoiling import Tree, mutated, mutated_value, read_tree, spoilt, write_spoilt

LINE = 2_000
"""Characters that a line of a message may have."""
Attempt = Callable[[np.random.Generator, Path], None]
"""Spoils files in an empty folder and loads them; raises InputError where they are refused."""


def check_text(*said: str) -> None:
    """That what is shown is short, and can be printed."""
    for text in said:
        text.encode()
        if (longest := max(map(len, text.splitlines()), default=0)) > LINE:
            raise AssertionError(f"a line of {longest} characters: {text[:200]}")


def sources(kind: str) -> Attempt:
    """Examples of a source, read as an extraction reads them."""
    from public_sets import (
        picture,
        sample_files,
        subjects_row,
        uno_row,
        write_subjects,
        write_uno,
        write_webdataset,
    )

    from squeeze_jax.data.record_writer import RowError
    from squeeze_jax.data.sources import contract, open_source, split

    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        pictures = {f"{name}.png": picture(i, size=(24, 24)) for i, name in enumerate("abc")}
        rows = [
            {"prompt": ["a cat", "a sofa"], "image_paths": ["a.png", "b.png"],
             "image_tgt_path": "c.png", "x_note": {"a": 1}},
            {"prompt": "a dog", "image_paths": ["b.png"], "image_tgt_path": "a.png"},
            {"prompt": "a mug", "image_paths": [], "image_tgt_path": "b.png"},
        ]  # fmt: skip
        listed = [
            {"file_name": "c.png", "reference_file_names": ["a.png", "b.png"], "text": "a cat"},
            {"file_name": "a.png", "reference_file_name": "b.png", "text": "a dog"},
            {"file_name": "b.png", "reference_file_name": "c.png", "text": "a mug"},
        ]
        lines = "\n".join(map(json.dumps, listed)).encode()
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerows([["file_name", "reference_file_name", "text"], ["c.png", "a.png", "cat"],
                          ["a.png", "b.png", "a dog"], ["b.png", "c.png", "mug"]])  # fmt: skip
        trees: list[Tree] = {
            "json_list": lambda: [pictures | {"list.json": json.dumps(rows).encode()}],
            "json_lines": lambda: [
                pictures | {"list.jsonl": "\n".join(map(json.dumps, rows)).encode()}
            ],
            "image_folder": lambda: [
                pictures | {"metadata.jsonl": lines},
                pictures | {"metadata.csv": table.getvalue().encode()},
            ],
            "subjects200k": lambda: [
                read_tree(write_subjects(place, [[subjects_row(i) for i in range(4)]]))
            ],
            "uno1m": lambda: [read_tree(write_uno(place, {1: [uno_row(1, i) for i in range(3)]}))],
            "webdataset": lambda: [
                read_tree(write_webdataset(place, [[f for i in range(3) for f in sample_files(i)]]))
            ],
        }[kind]()
    prefix = {"image_folder": "folder"}.get(kind, kind)

    def attempt(rng: np.random.Generator, folder: Path) -> None:
        tree = trees[int(rng.integers(len(trees)))]
        if kind == "subjects200k" and rng.random() < 0.6:  # a whole file of other types
            _write_parquet(mutated_value([subjects_row(i) for i in range(4)], rng), folder)
        else:
            # Pictures are damaged now and then: the labels are what differs from kind to kind.
            text = {name: tree[name] for name in tree if not name.endswith(".png")}
            rest = {name: tree[name] for name in tree if name not in text}
            if rng.random() < 0.15 and rest:
                text, rest = rest, text
            for name, content in rest.items():
                (folder / name).write_bytes(content)
            write_spoilt(text, folder, rng)
        named = {"json_list": folder / "list.json", "json_lines": folder / "list.jsonl"}
        place = str(named.get(kind, f"{prefix}:{folder}"))
        limit = None if rng.random() < 0.9 else 2
        opened = open_source(place, contract.Options(None, limit, True, rng.random() < 0.5))
        check_text(*opened.report.warnings, *opened.report.listed(), opened.report.summary())
        for part in split(opened, 1, place).values():
            contract.parts_of(part), contract.most_references(part), contract.most_captions(part)
            for i in range(len(part)):
                contract.captions_of(part, i)
                check_text(part.name(i))
                try:
                    part[i]
                except RowError as error:
                    check_text(str(error))

    return attempt


def _write_parquet(rows: Any, folder: Path) -> None:
    """Whatever of the rows can be a table; else a file of nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=3)
    except Exception:  # no table has such rows
        (folder / "a.parquet").write_bytes(b"")


def tokenizers(_: str) -> Attempt:
    """The demo's tokenizer, and a prompt through it."""
    from squeeze_jax.data.chat import build_input, load_tokenizer
    from squeeze_jax.data.mllm import check_vocabulary
    from squeeze_jax.interop.load import DEMO, internvl_source

    content = (DEMO / "mllm" / "tokenizer.json").read_bytes()
    small = json.loads(content)
    config: Any = internvl_source(DEMO / "mllm").config

    def attempt(rng: np.random.Generator, folder: Path) -> None:
        value = copy.deepcopy(small)
        if rng.random() < 0.7:  # everything but the list of words, which is most of the file
            words = value["model"].pop("vocab")
            value = mutated_value(value, rng)
            if isinstance(value, dict) and isinstance(value.get("model"), dict):
                value["model"]["vocab"] = words
            text = json.dumps(value).encode()
        else:
            text = spoilt("tokenizer.json", content, rng)
        (folder / "tokenizer.json").write_bytes(text)
        tokenizer = load_tokenizer(folder)
        check_vocabulary(folder, tokenizer, config)
        build_input(tokenizer, "a red critter, dancing \u00e9\u4e2d <img>", [4, 4], "be \n kind")

    return attempt


def settings(_: str) -> Attempt:
    """The text inside a PNG, as `sample` writes it and the page reads it back."""
    from types import SimpleNamespace

    from tiny import tiny_config

    from squeeze_jax.app import session
    from squeeze_jax.data.images import save_png
    from squeeze_jax.sampling import png_metadata
    from squeeze_jax.sampling.settings import Settings, resolve

    config = tiny_config()
    resolved = resolve(Settings(seed=7, cfg_scale=(1.0, 2.0, 3.0)), config)
    references = [png_metadata.Reference("a/cat.png", 32, 48)]
    text: dict[str, Any] = png_metadata.text_of(
        "a cat", references, "demo", 3, resolved, 0, ["mllm"] * resolved.steps
    )
    with tempfile.TemporaryDirectory() as made:
        save_png(Path(made) / "a.png", np.zeros((16, 16, 3), np.uint8), text)
        whole = (Path(made) / "a.png").read_bytes()
    system: Any = SimpleNamespace(
        config=config, step=3, uses_references=True, resolved=lambda given: resolve(given, config)
    )
    page = object.__new__(session.AppState)  # with a system that draws nothing
    vars(page).update(pipeline=system, checkpoint="demo", folder=Path())

    def attempt(rng: np.random.Generator, folder: Path) -> None:
        content = mutated(whole, rng)
        if rng.random() < 0.8:
            values = mutated_value(text, rng)
            values = values if isinstance(values, dict) else text
            chunks = [_chunk(key, value, rng) for key, value in values.items()]
            start = whole.index(b"IHDR") + 21  # the picture's header with its checksum
            content = whole[:start] + b"".join(chunks) + whole[whole.index(b"IDAT") - 4 :]
        (folder / "a.png").write_bytes(content)
        found = png_metadata.read(folder / "a.png")
        values, notes = session.restore(page, found)
        check_text(*notes)
        own = Settings(**{"height": 32, "width": 32, "steps": 4} | values)  # pyright: ignore
        session.plan(page, own, references=True)
        session.file_stem(found.prompt)

    return attempt


def _chunk(key: str, value: Any, rng: np.random.Generator) -> bytes:
    """One text of a PNG, plain, packed or international."""
    said = value if isinstance(value, str) else json.dumps(value)
    raw = said.encode(errors="surrogatepass")
    raw = mutated(raw, rng) if rng.random() < 0.1 else raw
    name = key.encode(errors="replace")[:79] or b"a"
    kind, content = (
        (b"tEXt", name + b"\0" + raw),
        (b"zTXt", name + b"\0\0" + zlib.compress(raw)),
        (b"iTXt", name + b"\0\0\0\0\0" + raw),
    )[int(rng.integers(3))]
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def records(_: str) -> Attempt:
    """A folder of feature records: read one by one and in batches, and continued."""
    from array_record.python import array_record_module  # pyright: ignore
    from fake_encoders import FakeEncoders, some_examples

    from squeeze_jax.data.pipeline import make_dataset
    from squeeze_jax.data.record_writer import extract
    from squeeze_jax.data.records import FeatureSource

    examples = some_examples(6)
    options: Any = {"target_size": (32, 32), "reference_long_side": 32, "examples_per_shard": 4}
    with tempfile.TemporaryDirectory() as made:
        extract(examples, FakeEncoders(), made, **options)
        tree = read_tree(Path(made))
    shard = next(name for name in tree if name.endswith("00000-of-00002"))

    def attempt(rng: np.random.Generator, folder: Path) -> None:
        kind = rng.random()
        if kind < 0.3:  # a whole shard with a spoilt record in it
            for name, content in tree.items():
                (folder / name).write_bytes(content)
            reader = array_record_module.ArrayRecordReader(str(folder / shard))
            rows = reader.read_all()
            reader.close()
            rows[1] = mutated(rows[1], rng)
            writer = array_record_module.ArrayRecordWriter(str(folder / shard), "group_size:1")
            for row in rows:
                writer.write(row)
            writer.close()
        else:
            write_spoilt(tree, folder, rng)
        if 0.2 < kind < 0.4:
            extract(examples, FakeEncoders(), folder, **options)
        source = FeatureSource(folder)
        for i in range(len(source)):
            source[i]
        batches = make_dataset(folder, batch=2, seed=0)
        try:
            next(batches)
        finally:
            batches.close()

    return attempt


def checkpoints(_: str) -> Attempt:
    """A work folder with two checkpoints: sampled from, and gone on with."""
    import jax
    from tiny import tiny_config

    from squeeze_jax.checkpoints.manager import (
        Checkpoints,
        Saved,
        read_weights,
        saved_base,
        saved_step,
        write_config,
    )
    from squeeze_jax.data.pipeline import BatchIterator
    from squeeze_jax.training.start import restore_latest
    from squeeze_jax.training.state import TrainState, to_saved

    warnings.simplefilter("ignore")  # Orbax, about restoring without shardings
    config = tiny_config()
    leaves = {"a.kernel": jax.numpy.arange(12.0).reshape(3, 4), "b.scale": jax.numpy.ones(5)}
    zero = jax.numpy.zeros((), jax.numpy.int32)
    state = TrainState(zero, leaves, ({"mu": leaves},), dict(leaves), zero)
    with tempfile.TemporaryDirectory() as made:
        whole = Checkpoints(Path(made), keep=2)
        for step in (1, 2):
            whole.save(step, to_saved(state), b'{"place": 1}', Saved(config, "base", 1.0))
            whole.wait()
        whole.close()
        write_config(Path(made), config)
        tree = read_tree(Path(made))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state
    )

    class Data(BatchIterator):
        """Takes any place."""

        def __init__(self) -> None: ...

        def set_state(self, state: bytes) -> None:
            json.loads(state)["place"]

    data = Data()

    def attempt(rng: np.random.Generator, folder: Path) -> None:
        write_spoilt(tree, folder, rng, of="config.json" if rng.random() < 0.1 else "checkpoints/2")
        if rng.random() < 0.5:
            saved_step(folder), saved_base(folder)
            _, read, step = read_weights(folder)
            check_same(read, leaves if step == 2 else None)
            return
        found = Checkpoints(folder, keep=2)
        try:
            restored = restore_latest(found, wanted, data, config, "base", False, check_text)
            if restored is not None:
                check_same(to_saved(restored[0]), to_saved(state))
        finally:
            found.close()

    return attempt


def check_same(read: Any, wanted: Any) -> None:
    """That arrays which load are those that were saved, down to the last bit."""
    import jax

    if wanted is not None:
        jax.tree.map(np.testing.assert_array_equal, read, wanted)


SOURCES = ("json_list", "json_lines", "image_folder", "subjects200k", "uno1m", "webdataset")
TARGETS: dict[str, Callable[[str], Attempt]] = {
    **dict.fromkeys(SOURCES, sources),
    "tokenizers": tokenizers,
    "settings": settings,
    "records": records,
    "checkpoints": checkpoints,
}
"""Target → what makes its attempts, of the target's name."""


def make_attempt(target: str) -> Attempt:
    """What spoils and loads the files of a target."""
    return TARGETS[target](target)
