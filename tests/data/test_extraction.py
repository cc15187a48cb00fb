"""What `extract` and `train` do with a manifest: what is refused, what is not done again, how many rows a shard gets."""

import dataclasses
import json
from pathlib import Path

import pytest
from etils import epath
from PIL import Image

from squeeze_jax.config import load_preset
from squeeze_jax.data import manifest
from squeeze_jax.data.check_records import check_records
from squeeze_jax.data.extraction import MOST_BYTES, extract_features, rows_of_shard
from squeeze_jax.data.feature_extractor import FeatureExtractor
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.grids import check_encoders

CONFIGS = Path(__file__).parents[2] / "configs"


def test_shards_of_large_records_have_fewer_rows():
    demo, full = (load_preset(CONFIGS / name) for name in ("demo.py", "flux_stage2.py"))
    assert rows_of_shard(demo, 5) == 1024
    assert rows_of_shard(full, 29) == MOST_BYTES // (29 * 320 * 3584 * 2) == 32
    int8 = dataclasses.replace(full, data=dataclasses.replace(full.data, codec="int8"))
    assert rows_of_shard(int8, 29) == 64
    assert rows_of_shard(full, 1) == 936
    assert rows_of_shard(full, 29, references=4) == 9
    tiles = dataclasses.replace(full, data=dataclasses.replace(full.data, max_tiles=12))
    assert rows_of_shard(tiles, 29) == 3
    with pytest.raises(InputError, match=r"4 references in up to 13 tiles would take 2\.\d GiB, more than 2"):
        rows_of_shard(tiles, 29, references=4)


@pytest.fixture
def photographs(tmp_path):
    """A config over a manifest of four rows, encoded by the miniature."""
    rows = []
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"prompt": f"picture {i}", "image_paths": ["0.png"], "image_tgt_path": f"{i}.png"})
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    demo = load_preset(CONFIGS / "demo.py")
    return dataclasses.replace(
        demo, data=dataclasses.replace(demo.data, critters=None, manifest=str(tmp_path / "pairs.json"))
    )


def test_what_is_extracted_is_not_looked_at_again(photographs, tmp_path, monkeypatch):
    out = epath.Path(tmp_path / "out")
    extract_features(photographs, out)
    check_encoders(FeatureExtractor.of(photographs), out)
    monkeypatch.setattr(FeatureExtractor, "of", lambda config: pytest.fail("encoders were loaded"))
    monkeypatch.setattr(manifest, "load_image", lambda path: pytest.fail("a picture was decoded"))
    extract_features(photographs, out)
    monkeypatch.undo()
    (shard,) = (tmp_path / "out" / "train").glob("*.array_record-00000-of-00001")
    before = shard.read_bytes()
    shard.unlink()  # as a damaged record's message says
    extract_features(photographs, out)
    assert shard.read_bytes() == before
    Image.effect_noise((64, 64), 50).save(tmp_path / "1.png")  # a picture is replaced: other records
    with pytest.raises(InputError, match="holds an extraction with source"):
        extract_features(photographs, out)


def test_records_that_sampling_would_make_otherwise_are_refused(photographs, tmp_path):
    extract_features(photographs, tmp_path)
    check_records(epath.Path(tmp_path / "train"), photographs)
    for name, value in (("system_text", "You are a pirate."), ("max_tiles", 4), ("reference_long_side", 32)):
        other = dataclasses.replace(photographs, data=dataclasses.replace(photographs.data, **{name: value}))
        with pytest.raises(InputError, match=f"made with data.{name} .*, this config has"):
            check_records(epath.Path(tmp_path / "train"), other)
    encoders = FeatureExtractor.of(photographs)
    encoders.settings["mllm"] = "0123"
    with pytest.raises(InputError, match=r"made by other encoders .mllm '.*' there and '0123' here"):
        check_encoders(encoders, epath.Path(tmp_path))


def test_prompts_that_cannot_be_read_are_listed_before_any_is(photographs, tmp_path):
    path = tmp_path / "pairs.json"
    rows = json.loads(path.read_text())
    rows[1]["prompt"], rows[3]["prompt"] = "cat " * 500, "a \ud800"
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"2 prompts cannot be read:\n  row 2: .*too long(.|\n)*row 4: ") as refused:
        extract_features(photographs, tmp_path / "out")
    assert str(refused.value).count("\n") == 2
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_used_are_left_out_on_demand(photographs, tmp_path, capsys):
    (tmp_path / "2.png").write_bytes(b"cut")
    with pytest.raises(InputError, match="1 of 4 rows cannot be used"):
        extract_features(photographs, tmp_path / "out")
    skipping = dataclasses.replace(photographs, data=dataclasses.replace(photographs.data, skip_bad=True))
    extract_features(skipping, tmp_path / "out")
    assert "skipped 1 of 4 rows" in capsys.readouterr().out
    assert len(FeatureSource(tmp_path / "out" / "train")) == 2
