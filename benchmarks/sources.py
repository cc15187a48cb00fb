"""Rows a second of each source beside decoding its pictures alone, and memory by size of the set.

    python benchmarks/sources.py [--rows 150]
    python benchmarks/sources.py --memory 10000 1000000
    python benchmarks/sources.py --epoch 10000 1000000

The first makes sets of photograph-like pictures (smooth noise; two of 793 x 1024 pixels a row as
PNG, Subjects200K's composites as JPEG) and reads every example; `decoding` opens the same bytes
from memory. The second makes UNO-1M of tiny pictures in splits of 10,000 rows, reads all labels and
captions and the pictures of two splits, each in a process of its own. The third plans three epochs
of batches from the metadata of so many records, in two folders with weights.
"""

import argparse
import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SPLIT, READ = 10_000, 2
"""Rows of a split of UNO-1M, and splits whose pictures the second part reads."""
BATCH = 256
"""Examples a step, for the third part."""


def photograph(rng: np.random.Generator, width: int, height: int, kind: str) -> bytes:
    """Smooth noise with some grain: as large as a photograph, and as slow to decode."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-4, 5, (height, width, 1), np.int16)
    file = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(file, kind, quality=92)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def label(row: int) -> dict[str, object]:
    """A row of UNO-1M with captions of 60 words, of any split."""
    said = f"{row} " + "the mug stands on a table near the window " * 7
    return {
        "img_path1": f"object{row}_a.png",
        "img_path2": f"object{row}_b.png",
        "caption": {"img_path1": said, "img_path2": said, "subject": ["mug"], "judgment": "same"},
        "vlm_filter_cot": {"score_part": {"shape": 4.0, "colour": 4.0}, "score_final": 4.0},
    }


def write_uno(folder: Path, pictures: list[bytes], order: np.ndarray) -> None:
    """One split whose archive has the pictures in this order."""
    for name in ("labels", "images"):
        (folder / name).mkdir(parents=True)
    rows = [label(row) for row in range(len(pictures) // 2)]
    (folder / "labels" / "split1.json").write_text(json.dumps(rows))
    names = [str(row[side]) for row in rows for side in ("img_path1", "img_path2")]
    path = folder / "images" / "split1.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for place in order:
            add(tar, names[place], pictures[place])


def write_sets(folder: Path, pairs: list[bytes], composites: list[bytes]) -> dict[str, list[bytes]]:
    """Writes every kind; returns each source with the pictures that reading it decodes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = len(pairs) // 2
    made: dict[str, list[bytes]] = {}
    plain = folder / "plain"
    plain.mkdir()
    listed = []
    for row in range(rows):
        for side in (0, 1):
            (plain / f"{row}_{side}.png").write_bytes(pairs[2 * row + side])
        listed.append(
            {"prompt": "a", "image_paths": [f"{row}_1.png"], "image_tgt_path": f"{row}_0.png"}
        )
    (plain / "pairs.json").write_text(json.dumps(listed))
    (plain / "pairs.jsonl").write_text("\n".join(map(json.dumps, listed)))
    table = ["file_name,reference_file_name,text", *(f"{r}_0.png,{r}_1.png,a" for r in range(rows))]
    (plain / "metadata.csv").write_text("\n".join(table))
    for source in (plain / "pairs.json", plain / "pairs.jsonl", f"folder:{plain}"):
        made[str(source)] = pairs

    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "0.tar", "w") as tar:
        for row in range(rows):
            add(tar, f"{row:06d}.target.png", pairs[2 * row])
            add(tar, f"{row:06d}.reference0.png", pairs[2 * row + 1])
            add(tar, f"{row:06d}.txt", b"a mug")
    made[f"webdataset:{folder / 'tars'}"] = pairs

    (folder / "parquet").mkdir()
    described = {"item": "mug", "description_0": "a", "description_1": "b"}
    scores = dict.fromkeys(("compositeStructure", "objectConsistency", "imageQuality"), 5)
    values = [
        {
            "image": {"bytes": image, "path": None},
            "description": described,
            "quality_assessment": scores,
        }
        for image in composites
    ]
    pq.write_table(
        pa.Table.from_pylist(values), folder / "parquet" / "0.parquet", row_group_size=100
    )
    made[f"subjects200k:{folder / 'parquet'}"] = composites

    orders = {
        "sorted": np.arange(2 * rows),
        "shuffled": np.random.default_rng(0).permutation(2 * rows),
    }
    for name, order in orders.items():
        write_uno(folder / name, pairs, order)
        made[f"uno1m:{folder / name}"] = pairs
    write_uno(folder / "unpacked", pairs, orders["sorted"])
    with tarfile.open(folder / "unpacked" / "images" / "split1.tar.gz") as tar:
        tar.extractall(folder / "unpacked" / "images", filter="data")
    made[f"uno1m:{folder / 'unpacked'}"] = pairs
    return made


def seconds(run: Callable[[], object]) -> float:
    """Processor seconds of this process, the faster of two runs."""
    taken = []
    for _ in range(2):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return min(taken)


def speed(rows: int) -> None:
    from squeeze_jax.data.images import decode_image
    from squeeze_jax.data.sources import open_source
    from squeeze_jax.data.sources.contract import Options

    rng = np.random.default_rng(0)
    pairs = [photograph(rng, 793, 1024, "PNG") for _ in range(2 * rows)]
    composites = [photograph(rng, 2 * 512 + 48, 512 + 32, "JPEG") for _ in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        print("| source | rows a second | decoding alone | ratio |\n|---|---|---|---|")
        for source, pictures in write_sets(Path(folder), pairs, composites).items():

            def decode(pictures: list[bytes] = pictures) -> None:
                for content in pictures:
                    decode_image(io.BytesIO(content), "picture")

            def read(source: str = source) -> None:
                examples = open_source(source, Options()).rows
                for index in range(len(examples)):
                    examples[index]

            own, alone = seconds(read), seconds(decode)
            name = source.replace(folder, "").replace("/", " ").strip()
            print(f"| {name} | {rows / own:.1f} | {rows / alone:.1f} | {alone / own:.2f} |")


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak(folder: Path, queue: "multiprocessing.Queue[tuple[int, int, float]]") -> None:
    """Opens the set and reads it; puts bytes before, bytes at most, and seconds."""
    from squeeze_jax.data.sources import open_source
    from squeeze_jax.data.sources.contract import Options

    before, began = memory("VmRSS"), time.perf_counter()
    examples = open_source(f"uno1m:{folder}", Options()).rows
    for index in range(len(examples)):
        examples.prompt(index)
        if index < READ * 2 * SPLIT:
            examples[index]
    queue.put((before, memory("VmHWM"), time.perf_counter() - began))


def memory_of(rows: int) -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder, splits = Path(temporary), max(1, rows // SPLIT)
        for name in ("labels", "images"):
            (folder / name).mkdir()
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "PNG")
        first = folder / "images" / "split1.tar.gz"
        with tarfile.open(first, "w:gz", compresslevel=1) as tar:
            for place in np.random.default_rng(0).permutation(2 * SPLIT):
                add(tar, f"split1/object{place // 2}_{'ab'[place % 2]}.png", file.getvalue())
        labels = folder / "labels" / "split1.json"
        labels.write_text(json.dumps([label(row) for row in range(SPLIT)]))
        for split in range(2, splits + 1):
            os.link(first, folder / "images" / f"split{split}.tar.gz")
            os.link(labels, folder / "labels" / f"split{split}.json")
        queue = context.Queue()
        process = context.Process(target=peak, args=(folder, queue))
        process.start()
        before, most, taken = queue.get()
        process.join()
    print(
        f"{splits * SPLIT:,} rows: peak {most / 2**20:.0f} MiB, of which {before / 2**20:.0f} MiB "
        f"before the set was opened; {taken:.0f} s"
    )


def epoch(rows: int, queue: "multiprocessing.Queue[tuple[int, int, float, list[float]]]") -> None:
    """Plans training batches over the metadata of so many records, from two folders, of two shapes
    of target and one to three references.

    Puts bytes before, bytes at most, seconds until the first batch is known, and seconds of each
    batch after.
    """
    from squeeze_jax.data.order import Order
    from squeeze_jax.data.pipeline import buckets_of
    from squeeze_jax.data.records import METADATA_FILE, read_metadata

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        shape = {"layers": 29, "width": 3584, "target": [None, None, 16]}
        text, references = rng.integers(20, 256, rows).tolist(), rng.integers(1, 4, rows).tolist()
        sizes = [[64, 64 + 16 * (t % 2), t, 256 * r, r, 1024 * r] for t, r in zip(text, references)]
        most = {
            "max_text": 255,
            "max_image": 768,
            "max_references": 3,
            "max_reference_tokens": 3072,
        }
        summary = {"records": rows, "shape": shape, "sizes": sizes} | most
        values = {"summary": summary, "shards": [rows], "settings": {}, "codec": 1}
        (Path(folder) / METADATA_FILE).write_text(json.dumps(values))
        del sizes, summary, values, text, references
        before, began = memory("VmRSS"), time.perf_counter()
        found = read_metadata(folder).summary
        order = Order(
            buckets_of(found, BATCH), BATCH, 0, np.arange(BATCH), (0, rows // 3), (1.0, 1.0)
        )
        order[0]
        opened, taken = time.perf_counter() - began, []
        for step in np.linspace(1, 3 * rows // BATCH, 300).astype(int):  # of three epochs
            began = time.perf_counter()
            order[step]
            taken.append(time.perf_counter() - began)
    queue.put((before, memory("VmHWM"), opened, taken))


def epoch_of(rows: int) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=epoch, args=(rows, queue))
    process.start()
    before, most, opened, taken = queue.get()
    process.join()
    print(
        f"{rows:,} records: peak {most / 2**20:.0f} MiB, of which {before / 2**20:.0f} MiB before; "
        f"{opened:.1f} s until the first batch is known, "
        f"then {1e3 * np.mean(taken):.1f} ms a batch "
        f"of {BATCH}, {1e3 * max(taken):.0f} ms at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--memory", type=int, nargs="+", default=[])
    parser.add_argument("--epoch", type=int, nargs="+", default=[])
    given = parser.parse_args()
    for rows in given.epoch:
        epoch_of(rows)
    for rows in given.memory:
        memory_of(rows)
    if not (given.memory or given.epoch):
        speed(given.rows)


if __name__ == "__main__":
    main()
