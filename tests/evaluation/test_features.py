"""Features are computed once a picture, and never taken for those of another one."""

import numpy as np
import pytest
from PIL import Image

from squeeze_jax.errors import InputError
from squeeze_jax.evaluation import features
from squeeze_jax.evaluation.features import picture_features, text_features
from squeeze_jax.evaluation.judges import Judge


class Counter:
    """A judge of mean colours that remembers what it was asked, and may die."""

    def __init__(self, dies_at=None, digest="a"):
        self.seen, self.dies_at = 0, dies_at
        self.judge = Judge("mean", digest, {}, self.pictures, self.texts)

    def pictures(self, images):
        if self.dies_at is not None and self.seen + len(images) > self.dies_at:
            raise KeyboardInterrupt
        self.seen += len(images)
        return np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])

    def texts(self, prompts):
        self.seen += len(prompts)
        return np.array([[len(prompt), 1, 0] for prompt in prompts], np.float32)


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 2)
    found = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(found):
        Image.new("RGB", (4, 4), (10 * i, i, 255)).save(path)
    return found


def test_an_interrupted_scoring_goes_on(paths, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        picture_features(Counter(dies_at=3).judge, paths, tmp_path / "f", "drawn")
    second = Counter()
    found = picture_features(second.judge, paths, tmp_path / "f", "drawn")
    assert second.seen == 3
    assert np.array_equal(found, [[10 * i, i, 255] for i in range(5)])
    third = Counter()
    assert np.array_equal(
        picture_features(third.judge, paths[::-1], tmp_path / "f", "drawn"), found[::-1]
    )
    assert third.seen == 0


def test_a_picture_that_was_replaced_is_looked_at_again(paths, tmp_path):
    picture_features(Counter().judge, paths, tmp_path / "f", "drawn")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(paths[2])
    again = Counter()
    found = picture_features(again.judge, paths, tmp_path / "f", "drawn")
    assert again.seen == 1 and np.array_equal(found[2], [1, 2, 3])


def test_another_judge_computes_its_own(paths, tmp_path):
    picture_features(Counter().judge, paths, tmp_path / "f", "drawn")
    other = Counter(digest="b")
    picture_features(other.judge, paths, tmp_path / "f", "drawn")
    assert other.seen == 5


def test_equal_pictures_and_texts_are_judged_once(paths, tmp_path):
    one = Counter()
    assert len(picture_features(one.judge, [paths[0]] * 3, tmp_path / "f", "drawn")) == 3
    assert np.array_equal(
        text_features(one.judge, ["ab", "c", "ab"], tmp_path / "f")[:, 0], [2, 1, 2]
    )
    assert one.seen == 1 + 2


def test_a_torn_picture_is_named(paths, tmp_path):
    paths[1].write_bytes(paths[1].read_bytes()[:40])
    with pytest.raises(InputError, match=r"1\.png: "):
        picture_features(Counter().judge, paths, tmp_path / "f", "drawn")


def test_pictures_are_judged_upright_and_as_8_bits(tmp_path):
    """A phone's photograph with a red corner, and 16-bit grey, as a judge is handed them."""
    seen = []

    def look(images):
        seen.extend(images)
        return np.zeros((len(images), 3), np.float32)

    photo, exif = Image.new("RGB", (40, 20)), Image.Exif()
    photo.paste((255, 0, 0), (0, 0, 8, 8))
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (4, 1))).save(tmp_path / "ramp.png")
    judge = Judge("eyes", "e", {}, look)
    files = [tmp_path / "phone.png", tmp_path / "ramp.png"]
    picture_features(judge, files, tmp_path / "f", "drawn")
    np.testing.assert_array_equal(seen[0], photo)
    np.testing.assert_array_equal(np.asarray(seen[1])[0, :, 0], np.arange(256))
