"""Every bad row is listed, with its remedy, before anything runs."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from squeeze_jax.data.manifest import read_manifest
from squeeze_jax.errors import InputError

# Other work on the machine must not fail a test: no time limits on single examples.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("target.png", "green")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / name)
    return tmp_path


def write(folder, rows):
    (folder / "manifest.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return folder / "manifest.json"


def row(**changes):
    return {"prompt": "a cat", "image_paths": ["a.png"], "image_tgt_path": "target.png"} | changes


def without(key):
    return {k: v for k, v in row().items() if k != key}


def error_of(folder, rows, need_targets=True, **options):
    with pytest.raises(InputError) as caught:
        read_manifest(write(folder, rows), need_targets=need_targets, **options)
    return str(caught.value)


def test_rows_come_as_written(folder):
    rows = [row(), row(image_paths=["b.png", "a.png"], x_source="web"), row(image_paths=[], critter={"ears": 2})]
    manifest = read_manifest(write(folder, rows), need_targets=True)
    assert [r.number for r in manifest.rows] == [1, 2, 3]
    assert [[p.name for p in r.references] for r in manifest.rows] == [["a.png"], ["b.png", "a.png"], []]
    assert manifest.rows[1].extra == {"x_source": "web"}
    assert manifest.rows[2].extra == {"critter": {"ears": 2}}
    assert manifest.rows[0].target == (folder / "target.png").resolve()
    assert manifest.warnings == []
    assert len(manifest.digest) == 64


def test_paths_resolve_against_the_manifest(folder, tmp_path_factory, monkeypatch):
    path = write(folder, [row(), row(image_paths=[str(folder / "a.png")])])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert len(read_manifest(path, need_targets=True).rows) == 2
    monkeypatch.chdir(folder)
    assert read_manifest("manifest.json", need_targets=True).rows[0].references[0].is_absolute()


def test_a_byte_order_mark_is_fine(folder):
    assert read_manifest(write(folder, "\ufeff" + json.dumps([row()])), need_targets=True).rows


def test_every_bad_row_is_listed(folder):
    message = error_of(
        folder,
        [
            without("prompt") | {"promt": "x"},
            row(),
            row(prompt="  "),
            row(image_paths=["gone.png", "a.png"]),
            "text",
            row(image_paths="a.png"),
            row(image_tgt_path=7),
            without("image_paths"),
            row(prompt=None, size=3),
        ],
    )
    assert "8 of 9 rows" in message
    for part in (
        'row 1: unknown field "promt"; did you mean "prompt"?',
        'row 3: "prompt" is empty',
        'row 4: image_paths[0] "gone.png": no such file',
        "row 5: is a string; write an object",
        'row 6: "image_paths" is a string; write a list of paths',
        "row 7: image_tgt_path is a number",
        'row 8: "image_paths" is missing; write [] for text only',
        'row 9: unknown field "size"; start the names of your own fields with x_',
        'row 9: "prompt" is null; write a string',
    ):
        assert part in message
    assert "row 2:" not in message
    assert '"prompt" is missing' not in message


@pytest.mark.parametrize("bad", [without("image_tgt_path"), row(image_tgt_path=None)], ids=["absent", "null"])
def test_a_missing_target_is_for_sampling_only(folder, bad):
    assert 'row 1: "image_tgt_path" is missing; training' in error_of(folder, [bad])
    assert read_manifest(write(folder, [bad]), need_targets=False).rows[0].target is None


def test_paths_that_leave_the_folder_are_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (8, 8)).save(outside / "o.png")
    (folder / "link.png").symlink_to(outside / "o.png")
    (folder / "dir").symlink_to(outside)
    names = [f"../{outside.name}/o.png", str(outside / "o.png"), "link.png", "dir/o.png", "/etc/passwd"]
    message = error_of(folder, [row(image_paths=[name]) for name in names])
    for number in range(1, len(names) + 1):
        assert f"row {number}: image_paths[0]" in message
    assert message.count("leads out of the folder of pictures") == len(names)


def test_pictures_may_lie_on_another_disk_below_one_folder(folder, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    for name in ("pictures/a.png", "pictures/b.png", "other/c.png"):
        (disk / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(disk / name)
    absolute, relative = str(disk / "pictures" / "a.png"), "b.png"
    path = write(folder, [row(image_paths=[absolute, relative], image_tgt_path=relative)])
    (read,) = read_manifest(path, need_targets=True, image_root=disk / "pictures").rows
    assert read.references == (disk / "pictures" / "a.png", disk / "pictures" / "b.png")
    path = write(folder, [row(image_paths=[str(disk / "other" / "c.png")], image_tgt_path=relative)])
    with pytest.raises(InputError, match=r"leads out of .*/pictures; .*--data\.image-root DIR"):
        read_manifest(path, need_targets=True, image_root=disk / "pictures")
    with pytest.raises(InputError, match=r"data\.image_root .*/gone: no such folder"):
        read_manifest(path, need_targets=True, image_root=disk / "gone")


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, ".", None, ["a.png"]], ids=str)
def test_odd_paths_are_one_sentence(folder, name):
    assert "row 1: image_paths[0]" in error_of(folder, [row(image_paths=[name])])


def test_the_same_picture_twice_is_a_warning(folder):
    (folder / "copy.png").write_bytes((folder / "target.png").read_bytes())
    rows = [row(), row(image_paths=["a.png", "copy.png"]), row(image_paths=["target.png"])]
    warnings = read_manifest(write(folder, rows), need_targets=True).warnings
    assert [w.split(":")[0] for w in warnings] == ["row 2", "row 3"]
    assert "teach copying" in warnings[0]


def test_the_same_row_again_is_noticed(folder):
    warnings = read_manifest(write(folder, [row(), row(prompt="another"), row()]), need_targets=True).warnings
    assert [warning for warning in warnings if "the same as row 1" in warning and warning.startswith("row 3: ")]
    assert len([warning for warning in warnings if "the same as" in warning]) == 1


def test_a_truncated_picture_is_found_by_decoding(folder):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-500])
    rows = [row(), row(image_paths=["cut.jpg"]), row(image_tgt_path="cut.jpg")]
    message = error_of(folder, rows)
    assert "2 of 3 rows" in message
    assert message.count("cut.jpg: cannot be read") == 2
    assert len(read_manifest(folder / "manifest.json", need_targets=True, check_images=False).rows) == 3
    kept = read_manifest(folder / "manifest.json", need_targets=True, skip_bad=True)
    assert [r.number for r in kept.rows] == [1]
    assert kept.warnings[0] == "skipped 2 of 3 rows"
    assert "cut.jpg" in kept.warnings[1]


def test_skipping_everything_is_still_an_error(folder):
    assert "1 of 1 rows" in error_of(folder, [row(prompt="")], skip_bad=True)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('[{"prompt": "a",}]', "line 1 column 1"),
        ('[\n{"prompt": a}]', "line 2 column 12"),
        ('{"prompt": "a"}\n{"prompt": "b"}', "one JSON list, not one object a line"),
        ("[]", "the list is empty"),
        ("{}", "holds an object"),
        ("3", "holds a number"),
        ("", "line 1 column 1"),
        ("[" * 100_000, ""),
    ],
    ids=str,
)
def test_broken_files_are_one_sentence(folder, text, part):
    message = error_of(folder, text)
    assert part in message
    assert "manifest.json" in message
    assert "\n" not in message


def test_not_a_file_and_not_utf8(folder):
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        read_manifest(folder / "none.json", need_targets=True)
    with pytest.raises(InputError, match="a folder"):
        read_manifest(folder, need_targets=True)
    (folder / "manifest.json").write_bytes(b'[{"prompt": "\xff"}]')
    with pytest.raises(InputError, match="not UTF-8"):
        read_manifest(folder / "manifest.json", need_targets=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
)


@UNHURRIED
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["prompt", "image_paths", "image_tgt_path", "x_y", "z"]), JSON), max_size=3
    )
)
def test_any_json_gives_rows_or_an_input_error(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(rows))
    try:
        manifest = read_manifest(path, need_targets=False)
    except InputError:
        return
    assert len(manifest.rows) == len(rows)
