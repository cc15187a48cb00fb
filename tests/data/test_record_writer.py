"""Extraction: what a record holds, resuming, sharing the work, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
from fake_encoders import FakeEncoders, some_examples
from PIL import Image

from squeeze_jax.data.images import resize_for_reference, resize_for_target
from squeeze_jax.data.manifest import read_manifest
from squeeze_jax.data.record_writer import extract
from squeeze_jax.data.records import METADATA_FILE, FeatureSource
from squeeze_jax.data.sources import ManifestRows
from squeeze_jax.errors import InputError

OPTIONS = {"target_size": (64, 64), "reference_long_side": 64, "examples_per_shard": 4, "batch": 3}


def prompts_in(folder):
    source = FeatureSource(folder)
    return [source[i].prompt for i in range(len(source))]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_record_holds_what_the_encoders_made_of_the_row(tmp_path):
    examples = some_examples(8)
    extract(examples, FakeEncoders(), tmp_path, **OPTIONS)
    source, encoders = FeatureSource(tmp_path), FakeEncoders()
    for index, example in enumerate(examples):
        record = source[index]
        expected = encoders.hidden_states([example.prompt], [example.references])[0]
        np.testing.assert_array_equal(record.text, expected.text)
        np.testing.assert_array_equal(record.image, expected.image)
        np.testing.assert_array_equal(record.text_positions, expected.text_positions)
        np.testing.assert_array_equal(
            record.target, encoders.latents([resize_for_target(example.target, 64, 64)])[0]
        )
        latents = [encoders.latents([resize_for_reference(r, 64)])[0] for r in example.references]
        assert len(record.references) == len(latents)
        for found, wanted in zip(record.references, latents, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_pictures_of_one_size_go_together(tmp_path):
    encoders = FakeEncoders()
    extract(
        some_examples(12), encoders, tmp_path, **OPTIONS | {"examples_per_shard": 12, "batch": 6}
    )
    assert max(encoders.picture_batches) == 6
    assert len(encoders.picture_batches) < sum(encoders.picture_batches) / 2


@pytest.mark.parametrize("after", [0, 1, 4, 7, 9])
def test_an_interrupted_extraction_goes_on_without_loss_or_repetition(tmp_path, after):
    class Broken(FakeEncoders):
        def latents(self, images, canvas=None):
            if len(self.prompts) > after:
                raise KeyboardInterrupt
            return super().latents(images, canvas)

    examples = some_examples(10)
    with pytest.raises(KeyboardInterrupt):
        extract(examples, Broken(), tmp_path / "a", **OPTIONS)
    with pytest.raises(InputError, match=METADATA_FILE):
        FeatureSource(tmp_path / "a")
    second = FakeEncoders()
    extract(examples, second, tmp_path / "a", **OPTIONS)
    assert prompts_in(tmp_path / "a") == [example.prompt for example in examples]
    assert len(second.prompts) <= 10 - after // 4 * 4
    extract(examples, FakeEncoders(), tmp_path / "b", **OPTIONS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from fake_encoders import FakeEncoders, some_examples
from squeeze_jax.data.record_writer import extract
class Slow(FakeEncoders):
    def latents(self, images, canvas=None):
        time.sleep(0.02)
        print("batch", flush=True)
        return super().latents(images, canvas)
sys.stdin.readline()
extract(
    some_examples(40), Slow(), {out!r}, target_size=(64, 64), reference_long_side=64,
    examples_per_shard=4, batch=2, shard={shard!r},
)
"""


@pytest.mark.parametrize(
    "shares", [[(0, 2), (1, 2)], [(0, 1), (0, 1)]], ids=["shared out", "the same twice"]
)
def test_processes_at_once_one_killed_and_restarted_equal_one_uninterrupted(
    tmp_path, request, shares
):
    tests, out = str(request.config.rootpath / "tests"), str(tmp_path / "a")

    def start(shard):
        code = SLOW.format(tests=tests, out=out, shard=shard)
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)

    def go(process):
        process.stdin.write("go\n")
        process.stdin.flush()

    # All three are up before any begins, so that the last two work at once on a busy machine too.
    one, again, two = start(shares[0]), *map(start, shares)
    go(one)
    for _ in range(8):
        one.stdout.readline()
    one.kill()
    one.communicate()
    assert not (tmp_path / "a" / METADATA_FILE).exists()
    go(again)
    go(two)
    said = again.communicate(timeout=120)[0], two.communicate(timeout=120)[0]
    assert again.returncode == two.returncode == 0
    assert all("batch" in lines for lines in said), "both worked"
    extract(some_examples(40), FakeEncoders(), tmp_path / "b", **OPTIONS | {"batch": 2})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert prompts_in(tmp_path / "a") == [example.prompt for example in some_examples(40)]


def test_a_damaged_shard_is_made_again(tmp_path):
    examples = some_examples(10)
    extract(examples, FakeEncoders(), tmp_path, **OPTIONS)
    before = contents(tmp_path)
    path = tmp_path / "squeeze-train.array_record-00001-of-00003"
    path.write_bytes(path.read_bytes()[:-50_000])
    encoders = FakeEncoders()
    extract(examples, encoders, tmp_path, **OPTIONS)
    assert encoders.prompts == [example.prompt for example in examples[4:8]]
    assert contents(tmp_path) == before


def test_several_machines_share_the_work(tmp_path):
    examples = some_examples(10)
    done = [
        extract(examples, FakeEncoders(), tmp_path / "a", shard=(i, 3), **OPTIONS)
        for i in (2, 0, 1)
    ]
    assert done[:2] == [None, None]
    assert done[2].summary.records == 10
    extract(examples, FakeEncoders(), tmp_path / "b", **OPTIONS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_progress_counts_every_row(tmp_path):
    calls = []
    extract(
        some_examples(10),
        FakeEncoders(),
        tmp_path,
        progress=lambda *call: calls.append(call),
        **OPTIONS,
    )
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (10, 10)


def test_other_settings_are_refused(tmp_path):
    examples = some_examples(10)
    extract(examples, FakeEncoders(), tmp_path, source="seed 0", **OPTIONS)
    for encoders, rows, changes, named in (
        (FakeEncoders("other"), examples, {}, "encoders"),
        (FakeEncoders(), examples[:9], {}, "rows 10 there and 9 now"),
        (FakeEncoders(), examples, {"source": "seed 1"}, "source 'seed 0' there and 'seed 1' now"),
        (
            FakeEncoders(),
            examples,
            {"target_size": (32, 32)},
            r"target_size \[64, 64\] there and \[32, 32\] now",
        ),
    ):
        with pytest.raises(InputError, match=named):
            extract(rows, encoders, tmp_path, **{"source": "seed 0"} | OPTIONS | changes)


@pytest.mark.parametrize("shard", [(3, 3), (-1, 2), (0, 0)])
def test_impossible_shares_and_no_rows_are_refused(tmp_path, shard):
    with pytest.raises(InputError, match="shard"):
        extract(some_examples(2), FakeEncoders(), tmp_path, shard=shard, **OPTIONS)
    with pytest.raises(InputError, match="no rows"):
        extract([], FakeEncoders(), tmp_path, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_from_a_manifest_of_phone_photographs(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32), "red").save(tmp_path / "phone.jpg", exif=exif)
    Image.new("RGBA", (70, 70), (0, 0, 0, 0)).save(tmp_path / "target.png")
    rows = [{"prompt": "a cat", "image_paths": ["phone.jpg"], "image_tgt_path": "target.png"}]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    manifest = read_manifest(tmp_path / "m.json", need_targets=True)
    out = tmp_path / "out"
    extract(
        ManifestRows(manifest.rows, manifest.digest),
        FakeEncoders(),
        out,
        source=manifest.digest,
        **OPTIONS,
    )
    record = FeatureSource(out)[0]
    assert record.references[0].shape == (8, 4, 16), "upright: 64 high, 32 wide"
    np.testing.assert_allclose(record.target, 1.0)

    (tmp_path / "m.json").write_text(
        json.dumps([{"prompt": "a cat", "image_paths": ["phone.jpg"]}])
    )
    with pytest.raises(InputError, match=r"row 1: .*training needs"):
        ManifestRows(read_manifest(tmp_path / "m.json", need_targets=False).rows, "")


def test_a_phone_photograph_is_upright_as_reference_and_as_target(tmp_path):
    """By the one corner that is not black."""
    photo, exif = Image.new("RGB", (64, 64)), Image.Exif()
    photo.paste((255, 0, 0), (0, 0, 16, 16))
    exif[0x0112] = 6
    for name in ("reference.png", "target.png"):  # two files: equal ones teach copying
        photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / name, exif=exif)
    rows = [{"prompt": "a", "image_paths": ["reference.png"], "image_tgt_path": "target.png"}]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    manifest = read_manifest(tmp_path / "m.json", need_targets=True)
    extract(ManifestRows(manifest.rows, ""), FakeEncoders(), tmp_path / "out", **OPTIONS)
    record = FeatureSource(tmp_path / "out")[0]
    for latent in (record.target, *record.references):
        bright = np.argwhere(latent[..., 0] > -0.5)
        assert bright.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
