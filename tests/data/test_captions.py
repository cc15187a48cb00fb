"""The limit of text tokens: a choice, noted where it matters; longer captions are refused or
cut."""

import dataclasses
import json
from pathlib import Path

import pytest
from etils import epath
from PIL import Image

from squeeze_jax.config import DataConfig, load_preset
from squeeze_jax.config_json import from_json, to_json
from squeeze_jax.data.captions import CutCaptions, cut_caption
from squeeze_jax.data.extraction import extract_features
from squeeze_jax.data.records import FeatureSource, read_metadata
from squeeze_jax.data.sources import open_examples
from squeeze_jax.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
SENTENCE = "a red critter stands on the grass. "


@pytest.mark.parametrize(
    ("caption", "most", "cut"),
    [
        ("One. Two! Three?", 99, "One. Two! Three?"),
        ("One. Two! Three?", 15, "One. Two!"),
        ("One. Two! Three?", 9, "One. Two!"),
        ("One. Two! Three?", 8, "One."),
        ("One. Two! Three?", 3, "One. Two! Three?"),
        ('He said "stop." Then left.', 20, 'He said "stop."'),
        ("It is 3.5 m long and red", 10, "It is 3.5 m long and red"),
        ("一只猫。它在沙发上。很好", 7, "一只猫。"),
        ("", 5, ""),
    ],
)
def test_a_caption_is_cut_where_a_sentence_ends(caption, most, cut):
    assert cut_caption(caption, lambda text: len(text) <= most) == cut


@pytest.fixture
def long_captions(tmp_path):
    """A config over four rows, of which the second has about 300 tokens, the third about 200."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "b.png")
    prompts = ["short", SENTENCE * 15, SENTENCE * 10, "also short"]
    rows = [
        {"prompt": prompt, "image_paths": ["a.png"], "image_tgt_path": "b.png"}
        for prompt in prompts
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    return with_data(load_preset(CONFIGS / "demo.py"), source=str(tmp_path / "pairs.json"))


def with_data(config, **changes):
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, critters=None, **changes)
    )


def prompts_in(folder):
    source = FeatureSource(folder)
    return [source[index].prompt for index in range(len(source))]


def test_longer_than_the_limit_is_refused_left_out_or_cut(long_captions, tmp_path, capsys):
    with pytest.raises(InputError, match=r"1 prompts cannot be read:\n  row 2: .*limit is 256"):
        extract_features(long_captions, tmp_path / "refused")
    extract_features(with_data(long_captions, skip_bad=True), tmp_path / "without")
    assert prompts_in(tmp_path / "without" / "train") == ["short", SENTENCE * 10]
    assert "warning: skipped row 2: the prompt is too long" in capsys.readouterr().out
    extract_features(with_data(long_captions, long_captions="cut"), tmp_path / "cut")
    short, cut, kept = prompts_in(tmp_path / "cut" / "train")
    assert (short, kept) == ("short", SENTENCE * 10)
    count = cut.count(".")
    assert cut == (SENTENCE * count).strip()
    assert 10 < count < 15
    texts = FeatureSource(tmp_path / "cut" / "train")
    assert 256 - 20 < texts[1].text.shape[1] <= 256, "one sentence more would not fit"
    assert "1 of 3 captions that were read are cut" in capsys.readouterr().out


def test_what_samplers_draw_from_is_cut_too(long_captions):
    rows = open_examples(with_data(long_captions, long_captions="cut"), check_images=False)["train"]
    assert isinstance(rows, CutCaptions)
    assert rows[1].prompt == rows.prompt(1) != SENTENCE * 15


def test_the_limit_is_noted_and_records_from_before_are_good(long_captions, tmp_path):
    config = with_data(long_captions, max_text_tokens=512)
    out = epath.Path(tmp_path / "out")
    extract_features(config, out)
    noted = read_metadata(out / "train").settings
    assert noted["max_text_tokens"] == 512
    assert "long_captions" not in noted
    # A folder that does not say was made under 128: its records do not depend on the limit.
    for split in ("train", "held_out"):
        for name in ("squeeze.json", "extraction.json"):
            path = out / split / name
            content = json.loads(path.read_text())
            content.get("settings", content).pop("max_text_tokens")
            path.write_text(json.dumps(content))
    before = (out / "train" / "squeeze.json").read_bytes()
    extract_features(config, out)
    assert (out / "train" / "squeeze.json").read_bytes() == before
    with pytest.raises(InputError, match="long_captions None there and 'cut' now"):
        extract_features(with_data(config, long_captions="cut"), out)
    cut = with_data(config, long_captions="cut", max_text_tokens=100)
    extract_features(cut, tmp_path / "cut")
    with pytest.raises(InputError, match="max_text_tokens 100 there and 90 now"):
        extract_features(with_data(cut, max_text_tokens=90), tmp_path / "cut")


def test_a_config_without_the_limit_means_128():
    value = json.loads(to_json(load_preset(CONFIGS / "demo.py")))
    assert value["data"]["max_text_tokens"] == DataConfig().max_text_tokens == 256
    del value["data"]["max_text_tokens"]
    assert from_json(json.dumps(value)).data.max_text_tokens == 128
    del value["data"]
    assert from_json(json.dumps(value)).data.max_text_tokens == 128


def test_a_manifest_under_its_old_name_is_the_same_source(long_captions, tmp_path):
    config = with_data(long_captions, max_text_tokens=512)
    old = with_data(config, source=None, manifest=config.data.source)
    extract_features(old, tmp_path / "out")
    shard = next((tmp_path / "out" / "train").glob("*.array_record-00000-of-00001"))
    written = shard.stat().st_mtime_ns
    extract_features(config, tmp_path / "out")
    assert shard.stat().st_mtime_ns == written
    assert from_json(to_json(old)).data.manifest == config.data.source


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "a.json", "manifest": "b.json"}, "data.source and data.manifest are both set"),
        ({"max_text_tokens": 8}, "data.max_text_tokens is 8"),
        ({"limit": 0}, "data.limit is 0"),
    ],
)
def test_impossible_choices_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        DataConfig(**changes)
