"""Picture sets and prompts: as published, as UNO writes them, and as hostile hands do."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from PIL import Image
from small_sampling import NO_ENCODERS
from tiny import tiny_config

from squeeze_jax.errors import InputError
from squeeze_jax.evaluation.dreambench import FIXED, LIVE, dreambench_prompts, open_dataset
from squeeze_jax.evaluation.generate import describe_system
from squeeze_jax.evaluation.picture_set import (
    PictureSet,
    Prompt,
    begin_picture_set,
    read_picture_set,
    read_prompts,
)
from squeeze_jax.sampling.pipeline import Pipeline, Settings

pytest.importorskip("torch")  # the made-up DreamBench is beside the judges that are made of it
from tiny_judges import PROMPTS_FILE, save_dreambench

PROMPTS = (
    Prompt("dog/00", "a dog", ("dog/02.jpg",), ("dog",)),
    Prompt("0001", "text alone", (), extra={"kind": "x"}),
)


def picture_set(folder, images=2, **system):
    return PictureSet("dreambench", folder, images, {"checkpoint": "a", **system}, PROMPTS)


@pytest.fixture
def bench(tmp_path):
    return save_dreambench(tmp_path / "bench")


def test_the_published_folder_becomes_prompts_with_the_class_word(bench):
    dataset = open_dataset(bench)
    assert dataset == open_dataset(dataset) == bench / "dataset"
    prompts = dreambench_prompts(dataset, None)
    assert [(p.name, p.text, p.references, p.subjects) for p in prompts] == [
        ("can/00", "a can in the jungle", ("can/01.jpg",), ("can",)),
        ("can/01", "a red can", ("can/01.jpg",), ("can",)),
        ("dog/00", "a dog in the snow", ("dog/02.jpg",), ("dog",)),
        ("dog/01", "a dog wearing a santa hat", ("dog/02.jpg",), ("dog",)),
    ]


def test_the_table_names_thirty_subjects_of_which_nine_live():
    assert len(FIXED) == 30
    live = [name for name in FIXED if name.rstrip("0123456789") in LIVE]
    assert len(live) == 9 and "backpack_dog" not in live


def test_unos_rows_keep_their_reference_wherever_their_paths_begin(bench):
    rows = [
        {"prompt": "a can here", "image_paths": ["./dreambooth/dataset/can/00.jpg"], "index": 1,
         "image_tgt_path": "nowhere.jpg"},
        {"prompt": "both", "image_paths": ["x/can/00.jpg", "x/dog/01.jpg"]},
        {"prompt": "a can there", "image_paths": ["./dreambooth/dataset/can/00.jpg"]},
    ]  # fmt: skip
    source = bench / "uno.json"
    source.write_text(json.dumps(rows))
    prompts = dreambench_prompts(open_dataset(bench), source)
    assert [(p.name, p.references, p.subjects) for p in prompts] == [
        ("can/00", ("can/00.jpg",), ("can",)),
        ("can+dog/00", ("can/00.jpg", "dog/01.jpg"), ("can", "dog")),
        ("can/01", ("can/00.jpg",), ("can",)),
    ]
    assert prompts[0].extra == {"index": 1}


def test_any_json_in_unos_schema_is_read_relative_to_itself(bench):
    source = bench / "dataset" / "prompts.json"
    source.write_text(json.dumps([{"prompt": "p", "image_paths": ["can/00.jpg"], "task": "t"}]))
    (prompt,) = read_prompts(source)
    assert prompt == Prompt("0000", "p", ("can/00.jpg",), (), {"task": "t"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{}", "must be a JSON list"),
        ("[", "not JSON"),
        ('[{"prompt": " ", "image_paths": []}]', 'row 1: "prompt" is empty'),
        ('[{"prompt": "p", "image_paths": ["../secret.png"]}]', "leads out of"),
        ('[{"prompt": "p", "image_paths": ["torn.png"]}]', "cannot be read as a picture"),
        ("[3]", "row 1: is a number"),
    ],
)
def test_prompts_that_cannot_be_used_are_one_sentence(tmp_path, rows, message):
    (tmp_path / "secret.png").write_bytes(b"")
    folder = tmp_path / "prompts"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "whole.png")
    (folder / "torn.png").write_bytes((folder / "whole.png").read_bytes()[:80])
    (folder / "p.json").write_text(rows)
    with pytest.raises(InputError, match=message):
        read_prompts(folder / "p.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "not DreamBench's prompts_and_classes.txt"),
        (PROMPTS_FILE.replace("dog,dog\n", ""), "no class of .*dog"),
        (PROMPTS_FILE.replace("{1} in the jungle", "thing in the jungle"), "class once"),
    ],
)
def test_a_prompts_file_of_another_form_is_refused(bench, text, message):
    (bench / "dataset" / "prompts_and_classes.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        dreambench_prompts(open_dataset(bench), None)


def test_a_data_set_without_the_tables_picture_is_refused(bench):
    (bench / "dataset" / "dog" / "02.jpg").unlink()
    with pytest.raises(InputError, match="no picture 02"):
        dreambench_prompts(open_dataset(bench), None)


def test_a_list_is_read_as_it_was_written(tmp_path):
    wanted = picture_set(tmp_path / "references", seed=3)
    begin_picture_set(tmp_path, wanted)
    assert read_picture_set(tmp_path) == wanted
    assert read_picture_set(tmp_path, tmp_path / "other").references == tmp_path / "other"


def test_pictures_made_otherwise_are_not_mixed(tmp_path):
    begin_picture_set(tmp_path, picture_set(tmp_path, seed=0))
    begin_picture_set(tmp_path, picture_set(tmp_path / "moved", seed=0))
    with pytest.raises(InputError, match="seed 0 there and 1 here"):
        begin_picture_set(tmp_path, picture_set(tmp_path, seed=1))
    with pytest.raises(InputError, match="images_per_prompt"):
        begin_picture_set(tmp_path, picture_set(tmp_path, images=3, seed=0))


def test_an_incomplete_set_is_refused_and_counted(tmp_path):
    one = picture_set(tmp_path)
    for name in ("dog/00-0.png", "dog/00-1.jpg", "0001-1.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match="1 of 4 pictures are missing, the first is 0001-0"):
        one.pictures(tmp_path)
    (tmp_path / "0001-0.png").write_bytes(b"x")
    assert one.pictures(tmp_path)[1] == [tmp_path / "0001-0.png", tmp_path / "0001-1.webp"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2 is not 1"),
        ({"images_per_prompt": 0}, "must be a number from 1"),
        ({"system": "ours"}, "must be an object"),
        ({"prompts": []}, "at least one row"),
        ({"prompts": [3]}, "prompt 0 is no object"),
        ({"prompts": [{"name": "../x", "prompt": "p"}]}, "stay in the folder"),
        ({"prompts": [{"name": "a", "prompt": "p", "references": ["/x"]}]}, "stay in the folder"),
        ({"prompts": [{"name": "a", "prompt": "p", "subjects": "dog"}]}, "stay in the folder"),
        ({"prompts": [{"name": "a", "prompt": None}]}, "must be text"),
        ({"prompts": [{"name": "a", "prompt": "p"}] * 2}, "two prompts are called 'a'"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_sentence(tmp_path, change, message):
    value = picture_set(tmp_path).to_json() | change
    (tmp_path / "pictures.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        read_picture_set(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"height": 48}, {"width": 64}, {"steps": 3}, {"tau1": 0.7}, {"tau2": 0.1}, {"seed": 5},
        {"cfg_scale": 4.0}, {"cfg_scale": (1.0, 2.0, 3.0)}, {"solver": "multistep"},
        {"cache_interval": 2}, {"first_block_threshold": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_decides_a_picture_is_noted_beside_the_scores(change):
    """Sizes, steps, guidance, seed, solver, the weights and the size of references."""
    state = nnx.state(nnx.Dict(w=nnx.Param(jnp.ones(2))))
    pipeline = Pipeline(tiny_config(), NO_ENCODERS, None, (state,), step=7)
    plain = describe_system(pipeline, "runs/x", Settings(), 4)
    noted = describe_system(pipeline, "runs/x", Settings(**change), 4)
    ((name, value),) = change.items()
    assert noted[name] == (list(value) if isinstance(value, tuple) else value)
    assert {key for key in plain if plain[key] != noted[key]} == {name}
    assert plain["checkpoint"] == "runs/x" and plain["step"] == 7
    assert json.loads(json.dumps(noted)) == noted
    others = replace(pipeline, params=(jax.tree.map(lambda leaf: leaf + 1e-6, state),))
    other = describe_system(others, "runs/x", Settings(), 4)
    assert {key for key in plain if plain[key] != other[key]} == {"weights"}
