"""Subjects200K, from shards that pyarrow wrote."""

import pytest
from public_sets import (
    colour,
    composite,
    corner,
    picture,
    subjects_row,
    write_subjects,
)
from source_checks import all_of, extracted, opened

from squeeze_jax.data.record_writer import RowError
from squeeze_jax.data.records import FeatureSource
from squeeze_jax.data.sources.contract import Options
from squeeze_jax.errors import InputError


def test_each_side_of_a_composite_is_a_target_with_the_other_as_reference(tmp_path):
    rows = [subjects_row(i) for i in range(7)]
    write_subjects(tmp_path, [rows[:4], rows[4:]], row_group=3)
    found = opened("subjects200k", tmp_path)
    assert (found.report.rows, found.report.kept) == (7, 14)
    assert list(found.rows.parts) == [6, 2, 6]
    for number, example in enumerate(all_of(found.rows)):
        row, side = divmod(number, 2)
        assert example.prompt == f"{('left', 'right')[side]} {row}"
        assert corner(example.target) == colour(row, side)
        assert [corner(reference) for reference in example.references] == [colour(row, 1 - side)]
        assert example.target.size == example.references[0].size == (64, 64)
        # Not a pixel of the margin is left: the whole side has one colour.
        assert len(example.target.getcolors()) == len(example.references[0].getcolors()) == 1


@pytest.mark.parametrize(("side", "margin"), [(64, 8), (128, 16), (96, 0), (1024, 16)])
def test_the_composite_is_cut_by_its_own_size(tmp_path, side, margin):
    rows = [subjects_row(3, image=composite(3, side, margin))]
    write_subjects(tmp_path, [rows])
    example = opened("subjects200k", tmp_path).rows[0]
    assert example.target.size == (side, side)
    assert example.target.getcolors() == [(side * side, colour(3, 0))]
    assert example.references[0].getcolors() == [(side * side, colour(3, 1))]


def test_scores_of_subjects200k(tmp_path):
    scores = [(5, 5, 5), (5, 4, 5), None, (5, None, 5), (5, 5, 99), (3, 3, 3), (5, 5, -1)]
    write_subjects(tmp_path, [[subjects_row(i, score) for i, score in enumerate(scores)]])
    found = opened("subjects200k", tmp_path)
    assert found.report.kept == 2
    assert found.report.dropped == {"score below 5": 4, "score unknown": 8}
    found = opened("subjects200k", tmp_path, Options(min_score=3.0))
    assert found.report.dropped == {"score unknown": 8}
    assert opened("subjects200k", tmp_path, Options(min_score=0.0)).report.kept == 14


def test_hostile_parquet(tmp_path):
    rows = [
        subjects_row(0),
        subjects_row(1, left=None),
        subjects_row(2, right="  "),
        subjects_row(3, image=b""),
        subjects_row(4, image=b"no picture"),
        subjects_row(5, image=picture(5, size=(64, 64))),
        subjects_row(6, image=picture(6, size=(400, 64))),
        subjects_row(7),
    ]
    write_subjects(tmp_path / "a", [rows])
    with pytest.raises(InputError, match=r"2 of 16 examples cannot be used(.|\n)*row 2: descr"):
        opened("subjects200k", tmp_path / "a", Options())
    found = opened("subjects200k", tmp_path / "a")
    assert found.report.dropped == {"no caption": 2}
    skipped = []
    extracted(found.rows, tmp_path / "out", skip=skipped.append)
    assert len(FeatureSource(tmp_path / "out")) == 14 - len(skipped) == 6
    for text in (
        "row 4: its image has no bytes",
        "row 5: not a picture",
        "row 6: 64x64 pixels are",
    ):
        assert sum(text in str(error) for error in skipped) == 2
    # Of the second row group nothing is left; the others are read around it.
    read = FeatureSource(tmp_path / "out")
    assert read.metadata.shards == (4, 0, 0, 2)
    assert [read[i].prompt for i in range(6)] == [
        "left 0", "right 0", "right 1", "left 2", "left 7", "right 7",
    ]  # fmt: skip
    with pytest.raises(RowError, match="row 4"):
        extracted(found.rows, tmp_path / "other")
    only = opened("subjects200k", write_subjects(tmp_path / "c", [rows[3:5]])).rows
    with pytest.raises(InputError, match="none of the rows could be used"):
        extracted(only, tmp_path / "none", skip=skipped.append)

    write_subjects(tmp_path / "b", [[subjects_row(0)]], without=["description"])
    with pytest.raises(InputError, match="column description is missing, it has image"):
        opened("subjects200k", tmp_path / "b")
    shard = next((tmp_path / "a" / "data").iterdir())
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"00001\.parquet: not a whole parquet file"):
        opened("subjects200k", tmp_path / "a")
