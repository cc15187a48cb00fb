"""Several captions of a picture: a record for each, one of them drawn an epoch."""

import dataclasses
import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from fake_encoders import FakeEncoders, some_examples
from PIL import Image

from squeeze_jax.config import load_preset
from squeeze_jax.data.captions import CutCaptions
from squeeze_jax.data.chat import load_tokenizer
from squeeze_jax.data.extraction import Readable, check_prompts
from squeeze_jax.data.online import make_online
from squeeze_jax.data.pipeline import make_dataset
from squeeze_jax.data.record_writer import RowError, extract
from squeeze_jax.data.records import METADATA_FILE, FeatureSource, read_metadata
from squeeze_jax.data.sources import open_source
from squeeze_jax.data.sources.contract import Options, captions_of
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import encoder_folder

COUNTS = [1, 3, 2, 1, 4, 1, 2]
OPTIONS = {"target_size": (64, 64), "reference_long_side": 64, "examples_per_shard": 3, "batch": 4}


def several(counts=COUNTS):
    """Examples with so many captions, of different lengths."""
    return [
        example._replace(
            other_captions=tuple(f"number {i}, again" + "?" * n for n in range(count - 1))
        )
        for i, (example, count) in enumerate(zip(some_examples(len(counts)), counts, strict=True))
    ]


def captions(example):
    return [example.prompt, *example.other_captions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("several")
    extract(several(), FakeEncoders(), out, **OPTIONS)
    return out


def write_rows(folder, prompts, name="pairs.json"):
    for picture in ("a.png", "b.png"):
        Image.new("RGB", (64, 64), "red" if picture == "a.png" else "blue").save(folder / picture)
    rows = [{"prompt": p, "image_paths": ["a.png"], "image_tgt_path": "b.png"} for p in prompts]
    text = json.dumps(rows) if name == "pairs.json" else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return folder / name


# Sources


def test_lists_lines_and_folders_may_give_several(tmp_path):
    prompts = ["one", ["two", "too"], ["three"]]
    for name in ("pairs.json", "pairs.jsonl"):
        rows = open_source(str(write_rows(tmp_path, prompts, name)), Options()).rows
        assert [captions_of(rows, i) for i in range(3)] == [["one"], ["two", "too"], ["three"]]
        assert captions(rows[1]) == ["two", "too"]
    line = {"file_name": "b.png", "reference_file_name": "a.png", "text": ["two", "too"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    assert captions(open_source(f"folder:{tmp_path}", Options()).rows[0]) == ["two", "too"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], '"prompt" is an empty list; write at least one caption'),
        (["a", " "], r'"prompt"\[1\] is empty; say what the picture shows'),
        (["a", 3], r'"prompt"\[1\] is a number; write a string'),
        ([["a"]], r'"prompt"\[0\] is a list; write a string'),
    ],
)
def test_what_is_no_caption_is_named(tmp_path, prompt, said):
    with pytest.raises(InputError, match=f"row 2: {said}"):
        open_source(str(write_rows(tmp_path, ["a", prompt])), Options())


def test_every_caption_is_checked_and_cut(tmp_path):
    class Reader:
        width = layers = 1
        settings: ClassVar = {}

        def read(self, prompts, images):
            """Nobody asks for it."""

        def check(self, prompt, references):
            if len(prompt) > 9:
                raise InputError("the prompt is too long")

    long = "One two. Three."
    rows = open_source(str(write_rows(tmp_path, ["a", ["a", long], ["b", "c"]])), Options()).rows
    with pytest.raises(
        InputError, match="1 prompts cannot be read:\n  row 2 caption 2: the prompt is too long"
    ):
        check_prompts({"train": rows}, Reader(), lambda rows: range(len(rows)))
    readable = Readable(rows, Reader())
    assert captions(readable[2]) == ["b", "c"]
    with pytest.raises(RowError, match="row 2 caption 2"):
        readable[1]
    cut = CutCaptions(rows, lambda caption, references: len(caption) <= 9)
    assert captions_of(cut, 1) == captions(cut[1]) == ["a", "One two."]
    assert (cut.read, cut.cut) == (2, 1)


# Records


def test_each_caption_has_a_record_with_its_own_features(folder):
    source, encoders = FeatureSource(folder), FakeEncoders()
    examples = several()
    assert source.metadata.summary.captions == tuple(COUNTS)
    assert source.metadata.summary.examples == len(COUNTS)
    assert len(source) == sum(COUNTS)
    number = 0
    for example in examples:
        for caption in captions(example):
            record = source[number]
            expected = encoders.hidden_states([caption], [example.references])[0]
            assert record.prompt == caption
            np.testing.assert_array_equal(record.text, expected.text)
            np.testing.assert_array_equal(record.image, expected.image)
            np.testing.assert_array_equal(
                record.target, source[number - captions(example).index(caption)].target
            )
            assert len(record.references) == len(example.references)
            number += 1


def test_the_mllm_is_given_no_more_captions_at_once_than_a_batch(tmp_path):
    class Counting(FakeEncoders):
        def hidden_states(self, prompts, images):
            assert 0 < len(prompts) <= OPTIONS["batch"]
            return super().hidden_states(prompts, images)

    seen = []
    extract(
        several(),
        Counting(),
        tmp_path,
        **OPTIONS,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (len(COUNTS), len(COUNTS))
    assert max(done for done, _ in seen) == len(COUNTS), "progress counts examples"


def test_one_caption_each_is_written_as_before_there_were_several(tmp_path):
    extract(several([1] * 5), FakeEncoders(), tmp_path, **OPTIONS)
    for path in tmp_path.glob("*.json"):
        assert "captions" not in path.read_text(), path
    summary = read_metadata(tmp_path).summary
    assert (summary.captions, summary.examples) == ((), 5)


def test_a_killed_extraction_ends_with_the_same_bytes(folder, tmp_path):
    class Broken(FakeEncoders):
        def latents(self, images, canvas=None):
            if len(self.prompts) > 8:
                raise KeyboardInterrupt
            return super().latents(images, canvas)

    with pytest.raises(KeyboardInterrupt):
        extract(several(), Broken(), tmp_path, **OPTIONS)
    assert not (tmp_path / METADATA_FILE).exists()
    extract(several(), FakeEncoders(), tmp_path, **OPTIONS)
    names = [path.name for path in folder.iterdir()]
    assert {n: (tmp_path / n).read_bytes() for n in names} == {
        n: (folder / n).read_bytes() for n in names
    }


# Drawing


def example_of(numbers):
    return [int(np.searchsorted(np.cumsum(COUNTS), number, side="right")) for number in numbers]


def test_an_epoch_has_every_example_once_with_one_of_its_captions(folder):
    batches = make_dataset(folder, batch=1, seed=4)
    assert batches.epoch == len(COUNTS)
    assert batches.describe().startswith("14 records of 7 examples, 1 shape of batch")
    drawn = [batch.index.tolist()[0] for batch in islice(batches, 400 * len(COUNTS))]
    seen = Counter(drawn)
    for start in range(0, len(drawn), len(COUNTS)):
        assert sorted(example_of(drawn[start : start + len(COUNTS)])) == list(range(len(COUNTS)))
    firsts = np.cumsum([0, *COUNTS[:-1]])
    for first, count in zip(firsts.tolist(), COUNTS):
        shares = np.array([seen[first + i] for i in range(count)])
        assert shares.sum() == 400
        # Binomial: four deviations of a share of 1 / count.
        assert np.all(
            abs(shares - 400 / count) < 4 * (400 / count * (1 - 1 / count)) ** 0.5 + 1e-9
        ), shares
    of_one = [number for number in drawn if number in (1, 2, 3)]
    assert any(a == b for a, b in pairwise(of_one)), "drawn, not taken in turn"


@pytest.mark.parametrize("before", [0, 3, 7, 25])
def test_a_resumed_run_draws_the_same_captions(folder, before):
    options = {"batch": 3, "seed": 3, "rows": [0, 2]}
    whole = [b.index.tolist() for b in islice(make_dataset(folder, **options), 40)]
    first = make_dataset(folder, **options)
    list(islice(first, before))
    second = make_dataset(folder, **options)
    second.set_state(first.get_state())
    assert [b.index.tolist() for b in islice(second, 40 - before)] == whole[before:]
    other = [b.index.tolist() for b in islice(make_dataset(folder, **options | {"seed": 4}), 40)]
    assert other != whole


def test_captions_of_one_example_share_a_bucket(tmp_path):
    sizes = ((64, 64), (48, 96))
    examples = [
        example._replace(target=Image.new("RGB", (96, 48) if i % 2 else (64, 64)))
        for i, example in enumerate(several())
    ]
    extract(examples, FakeEncoders(), tmp_path, **OPTIONS, buckets=sizes)
    batches = make_dataset(tmp_path, batch=1, seed=0)
    source = FeatureSource(tmp_path)
    firsts = np.cumsum([0, *COUNTS[:-1]]).tolist()
    assert sorted(n for bucket in batches.buckets for n in bucket.records.tolist()) == firsts
    for bucket in batches.buckets:
        for first, count in zip(bucket.records.tolist(), bucket.captions.tolist()):
            assert count == COUNTS[firsts.index(first)]
            longest = max(source[first + i].text.shape[1] for i in range(count))
            assert longest <= bucket.padding.text
    drawn = [int(b.index[0]) for b in islice(batches, len(COUNTS))]
    assert sorted(example_of(drawn)) == list(range(len(COUNTS)))


def test_on_line_batches_draw_captions_in_the_order_of_records(tmp_path, folder):
    """The same numbers as from records; each row's tokens are those of its caption."""
    config = load_preset(Path(__file__).parents[2] / "configs" / "demo.py")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, critters=None, online=True, source="pairs.json"),
    )
    prompts = [[f"critter {i} so {n}" for n in range(count)] for i, count in enumerate(COUNTS)]
    rows = open_source(str(write_rows(tmp_path, prompts)), Options()).rows
    flat = [caption for own in prompts for caption in own]
    tokenizer = load_tokenizer(encoder_folder("demo", "mllm"))
    batches = make_online(rows, config, batch=2, seed=3)
    recorded = make_dataset(folder, batch=2, seed=3)
    for batch, record in islice(zip(batches, recorded), 12):
        assert batch.index.tolist() == record.index.tolist()
        for number, ids, valid in zip(batch.index.tolist(), batch.ids, batch.valid):
            assert flat[number] in tokenizer.decode(ids[valid].tolist())
