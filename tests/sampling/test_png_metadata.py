"""The settings inside a picture: what is written is read back, and anything else is one sentence."""

import pytest
from PIL import Image
from saved_pictures import RESOLVED, saved

from squeeze_jax.errors import InputError
from squeeze_jax.sampling import png_metadata
from squeeze_jax.sampling.pipeline import Resolved
from squeeze_jax.sampling.png_metadata import Embedded, Reference, text_of


def test_what_is_written_is_read_back(tmp_path):
    references = (Reference("a/cät.jpg", 10, 20),)
    text = text_of('{"1": ünï\n[2]}', references, "runs/x", 300, RESOLVED, 1, ["MLLM"] * 5)
    alone = Resolved(**vars(RESOLVED) | {"seed": 8, "num_images": 1})
    found = png_metadata.read(saved(tmp_path / "a.png", text))
    assert found == Embedded('{"1": ünï\n[2]}', references, "runs/x", 300, alone)
    assert (
        png_metadata.read(saved(tmp_path / "b.png", text | {"checkpoint_step": None})).checkpoint_step
        is None
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": None}, "steps"),
        ({"steps": True}, "True"),
        ({"steps": 2.5}, "2.5"),
        ({"tau1": float("nan")}, "nan"),
        ({"tau1": "__import__('os')"}, "cannot be read"),
        ({"seed": "9" * 5000}, "cannot be read"),
        ({"references": "[" * 100_000}, "cannot be read"),
        ({"references": 3}, "cannot be read"),
        ({"references": [{"path": 3, "height": 1, "width": 1}]}, "cannot be read"),
        ({"references": [{"height": 1, "width": 1}]}, "path"),
        ({"first_block_threshold": 0.1, "cache_interval": 2}, "two caches"),
        ({"first_block_threshold": -1.0}, "first_block_threshold"),
    ],
)
def test_settings_of_the_wrong_kind_are_one_sentence(tmp_path, change, words):
    path = saved(tmp_path / "x.png", text_of("a", (), "demo", None, RESOLVED, 0, []) | change)
    with pytest.raises(InputError, match=words) as refused:
        png_metadata.read(path)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("x.png: ")


def test_foreign_pictures_are_told_from_ours(tmp_path):
    grey = Image.new("RGB", (8, 8))
    with pytest.raises(InputError, match="no settings of squeeze_jax inside"):
        png_metadata.read(
            saved(
                tmp_path / "other.png",
                {"prompt": '{"3": {"class_type": "KSampler"}}', "workflow": "{}"},
            )
        )
    grey.save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="this is JPEG"):
        png_metadata.read(tmp_path / "a.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"text\.png: cannot be read"):
        png_metadata.read(tmp_path / "text.png")
