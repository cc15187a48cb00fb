"""Made-up shards of public data sets, as their owners write them: pyarrow, tarfile, json."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SCORES = ("compositeStructure", "objectConsistency", "imageQuality")


def colour(number, other=0):
    """A colour that tells a picture from all others of a test."""
    return (10 + 20 * (number % 12), 40 + 15 * (number // 12), int(90 + 50 * other))


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def picture(number, other=0, size=(64, 64)):
    return encoded(Image.new("RGB", size, colour(number, other)))


def composite(number, side=64, margin=8, kind="PNG"):
    """Two squares side by side with a grey margin around and between."""
    sheet = Image.new("RGB", (2 * side + 3 * margin, side + 2 * margin), (128, 128, 128))
    for place in (0, 1):
        square = Image.new("RGB", (side, side), colour(number, place))
        sheet.paste(square, (margin + place * (side + margin), margin))
    return encoded(sheet, kind)


def subjects_row(number, scores=(5, 5, 5), left="left {}", right="right {}", image=None):
    image = composite(number) if image is None else image
    return {
        "image": {"bytes": image or None, "path": None},
        "collection": "collection_1",
        "quality_assessment": None if scores is None else dict(zip(SCORES, scores)),
        "description": {
            "item": "mug",
            "description_0": left and left.format(number),
            "description_1": right and right.format(number),
            "category": None,
        },
    }


SUBJECTS = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "collection": pa.string(),
        "quality_assessment": pa.struct({name: pa.int64() for name in SCORES}),
        "description": pa.struct(
            {name: pa.string() for name in ("item", "description_0", "description_1", "category")}
        ),
    }
)


def write_subjects(folder, files, row_group=3, without=()):
    """files: the rows of each shard."""
    (folder / "data").mkdir(parents=True)
    for number, rows in enumerate(files):
        table = pa.Table.from_pylist(rows, SUBJECTS).drop_columns(list(without))
        name = f"train-{number:05d}-of-{len(files):05d}.parquet"
        pq.write_table(table, folder / "data" / name, row_group_size=row_group)
    return folder


def uno_row(split, number, score=4.0, one="scene {}", two="other scene {}", **changes):
    name = f"split{split}/object{number}"
    row = {
        "img_path1": f"{name}_a_64x64.png",
        "img_path2": f"{name}_b_64x64.png",
        "caption": {
            "img_path1": one and one.format(number),
            "img_path2": two and two.format(number),
            "subject": ["mug"],
            "judgment": "same",
        },
        "vlm_filter_cot": {"score_part": {"shape": 4}, "score_final": score},
    }
    return row | changes


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_uno(folder, splits, order=None, broken=(), leave_out=()):
    """splits: number → rows. order: shuffles the pictures of an archive, in place.

    broken: names whose bytes are no picture. leave_out: names that the archives lack.
    """
    (folder / "labels").mkdir(parents=True)
    (folder / "images").mkdir()
    for split, rows in splits.items():
        (folder / "labels" / f"split{split}.json").write_text(json.dumps(rows))
        names = []
        for row in rows:
            names += [row[side] for side in ("img_path1", "img_path2") if isinstance(row, dict)]
        numbers = {name: place for place, name in enumerate(dict.fromkeys(names))}
        names = [name for name in numbers if isinstance(name, str) and name not in leave_out]
        if order is not None:
            order(names)
        with tarfile.open(folder / "images" / f"split{split}.tar.gz", "w:gz") as tar:
            for name in names:
                content = b"no picture" if name in broken else picture(numbers[name] // 2, split)
                add(tar, name, content)
    return folder


def unpack(folder, split):
    """What people do with an archive; it is gone then."""
    archive = folder / "images" / f"split{split}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "images", filter="data")
    archive.unlink()


def write_webdataset(folder, shards):
    """shards: for each, pairs (name, content)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, files in enumerate(shards):
        with tarfile.open(folder / f"{number:06d}.tar", "w") as tar:
            for name, content in files:
                add(tar, name, content)
    return folder


def sample_files(number, references=1, caption="a mug {}"):
    """The files of one WebDataset sample."""
    files = [(f"{number:04d}.target.png", picture(number))]
    files += [(f"{number:04d}.reference{i}.png", picture(number, 1 + i)) for i in range(references)]
    return [*files, (f"{number:04d}.txt", caption.format(number).encode())]


def corner(image):
    return tuple(np.asarray(image)[0, 0].tolist())
