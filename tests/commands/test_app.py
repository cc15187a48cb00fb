"""The page to try it on: its functions without a browser."""

import dataclasses
import json
import re
import sys
import threading
import time

import numpy as np
import pytest
from painted_page import OWN, Painter
from PIL import Image
from saved_pictures import RESOLVED
from tiny import tiny_config
from uploads import broken_files

from squeeze_jax.app import session
from squeeze_jax.app.session import MAX_REFERENCES, AppState, Upload
from squeeze_jax.app.strip import PAINT, counts, stages_of_steps, strip
from squeeze_jax.commands import app
from squeeze_jax.data.images import save_png
from squeeze_jax.errors import InputError
from squeeze_jax.sampling import png_metadata
from squeeze_jax.sampling.pipeline import Resolved, Settings
from squeeze_jax.sampling.png_metadata import Embedded, Reference, text_of


@pytest.fixture
def studio(tmp_path):
    return AppState(Painter(), "tiny", tmp_path)


# The strip


def test_a_strip_has_a_cell_a_step_in_its_stages_colour():
    config = tiny_config()
    stages = stages_of_steps(config, RESOLVED, references=True)
    assert [name for name, _ in counts(stages)] == ["MLLM", "MLLM + VAE", "VAE"]
    html = strip(stages, done=2)
    assert html.count('class="done"') == 2 and html.count('class="ahead"') == 3
    assert re.findall(r'step \d+: ([^"]+)"', html) == stages
    assert all(paint in html for paint in PAINT.values())
    assert counts(stages_of_steps(config, RESOLVED, references=False)) == [("MLLM", 5)]


def test_the_page_names_a_stage_without_steps(studio):
    html = session.plan(studio, Settings(steps=2, tau1=0.9, tau2=0.7), references=1)
    assert "no step has MLLM + VAE: none of 2 begins at 0.7 ≤ t &lt; 0.9" in html
    assert "no step" not in session.plan(
        studio, Settings(steps=2, tau1=0.9, tau2=0.7), references=0
    )
    assert "no step" not in session.plan(studio, OWN, references=1)


def test_the_page_says_what_the_checkpoint_was_not_trained_for(studio, monkeypatch):
    asked = []

    def beyond(config, references, height, width):
        asked.append((references, height, width))
        return ["more than it <knows>"] if references > 1 else []

    monkeypatch.setattr(session, "beyond_training", beyond)
    assert "more than it &lt;knows&gt;" in session.plan(studio, OWN, references=2)
    assert "more than it" not in session.plan(studio, OWN, references=1)
    own = studio.pipeline.resolved(OWN)
    assert asked == [(2, own.height, own.width), (1, own.height, own.width)]


def test_a_strip_shows_both_conditions_throughout(studio):
    """By sliders that reach a τ1 above 1."""
    assert studio.ranges["tau1"].high == studio.ranges["tau2"].high == 1.1
    html = session.plan(studio, Settings(steps=4, tau1=1.1, tau2=0.0), references=1)
    assert re.findall(r'step \d+: ([^"]+)"', html) == ["MLLM + VAE"] * 4
    assert "4 × MLLM + VAE throughout" in html
    settings = dataclasses.replace(RESOLVED, tau1=1.1, tau2=0.0)
    values, notes = session.restore(studio, Embedded("p", (), "tiny", 12, settings))
    assert (values["tau1"], values["tau2"], notes) == (1.1, 0.0, [])


# Uploads


def test_broken_uploads_are_named_and_the_good_ones_stay(tmp_path):
    files = broken_files(tmp_path)
    turned, exif = Image.new("RGB", (6, 4)), Image.Exif()
    turned.putpixel((0, 0), (255, 255, 255))
    exif[0x0112] = 6
    turned.save(tmp_path / "phone.png", exif=exif)
    (tmp_path / "pages").mkdir()
    uploads = [
        Upload(path, path.name)
        for path in [files[0][0], tmp_path / "phone.png", *(path for path, _ in files[1:])]
    ]
    good, wrong = session.accept(uploads, tmp_path / "pages")
    assert [upload.name for upload in good] == ["phone.png"]
    assert len(wrong) == len(files)
    for (path, word), sentence in zip(files, wrong):
        assert sentence.startswith(f"{path.name}: ") and word in sentence
        assert str(tmp_path) not in sentence
    upright = Image.open(good[0].path)
    assert upright.size == (4, 6) and upright.getpixel((3, 0)) == (255, 255, 255)
    again, wrong = session.accept(good * (MAX_REFERENCES + 1), tmp_path / "pages")
    assert again == good * MAX_REFERENCES and "5 references" in wrong[0]


# Drawing


def test_a_run_shows_its_steps_and_ends_in_files_with_their_own_seeds(studio, tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "cat.png")
    settings = Settings(steps=30, seed=5, num_images=3)
    first, *middle, last = session.draw(
        studio, "A cat, jumping!", [Upload(tmp_path / "cat.png", "my cat.png")], settings
    )
    assert first.pictures is None
    assert len(middle) == 10
    assert [view.strip.count('class="done"') for view in middle] == list(range(3, 31, 3))
    assert middle[0].said == "Step 3 of 30: MLLM" and middle[-1].said.endswith("VAE")
    assert "3 pictures" in last.said
    assert [path.name for path in last.pictures] == [
        f"a-cat-jumping-{seed}.png" for seed in (5, 6, 7)
    ]
    for seed, path in zip((5, 6, 7), last.pictures):
        assert np.all(np.asarray(Image.open(path)) == seed)
        found = png_metadata.read(path)
        assert (found.prompt, found.checkpoint, found.checkpoint_step) == (
            "A cat, jumping!",
            "tiny",
            12,
        )
        assert found.references == (Reference("my cat.png", 20, 40),)
        assert (found.settings.seed, found.settings.num_images, found.settings.steps) == (
            seed,
            1,
            30,
        )
        with Image.open(path) as image:
            noted = json.loads(image.info["stages"])
        assert list(noted.items()) == counts(
            stages_of_steps(studio.pipeline.config, found.settings, True)
        )


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        (" ", OWN, "empty"),
        ("a", Settings(tau1=0.2, tau2=0.4), "tau2 0.4 is larger"),
        ("a", Settings(height=33), "33x32"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(studio, prompt, settings, words):
    with pytest.raises(InputError, match=words):
        list(session.draw(studio, prompt, [], settings))
    assert not studio.pipeline.asked


def test_restoring_takes_what_fits_and_names_what_does_not(studio):
    settings = Resolved(
        height=1024, width=48, steps=5, tau1=0.835, tau2=0.5, cfg_scale=1.0, seed=9, num_images=1
    )
    picture = Embedded("p", (Reference("/home/me/cat.jpg", 10, 20),), "demo", None, settings)
    values, notes = session.restore(studio, picture)
    assert values == {
        k: v for k, v in vars(settings).items() if k in studio.ranges and k != "height"
    }
    assert [
        word in " ".join(notes) for word in ("height 1024", "cat.jpg (10x20)", "demo", "/home")
    ] == [1, 1, 1, 0]
    for settings in (
        RESOLVED,
        dataclasses.replace(RESOLVED, max_order=2),
    ):  # an order that nothing is expanded to
        assert session.restore(studio, Embedded("p", (), "tiny", 12, settings))[1] == []
    late = dataclasses.replace(
        RESOLVED, seed=2**32
    )  # as an older version wrote the image after the last seed
    values, notes = session.restore(studio, Embedded("p", (), "tiny", 12, late))
    assert (values["seed"], notes) == (0, [])


def test_guidance_of_each_stage_survives_in_a_picture_and_the_page_names_it(studio, tmp_path):
    settings = dataclasses.replace(RESOLVED, cfg_scale=(2.5, 1.0, 3.0))
    save_png(
        tmp_path / "a.png",
        np.zeros((8, 8, 3), np.uint8),
        text_of("p", [], "tiny", 12, settings, 0, []),
    )
    picture = png_metadata.read(tmp_path / "a.png")
    assert picture.settings == dataclasses.replace(settings, num_images=1)
    values, notes = session.restore(studio, picture)
    assert "cfg_scale" not in values and "one number a stage" in notes[0]
    notes = session.restore(
        studio, Embedded("p", (), "tiny", 12, dataclasses.replace(RESOLVED, solver="multistep"))
    )[1]
    assert "multistep" in notes[0] and len(notes) == 1


def test_settings_from_sliders_are_whole_where_they_must_be(studio):
    sliders = {name: value for name, value in vars(RESOLVED).items() if name in studio.ranges}
    settings = session.settings_of({**sliders, "steps": 5.0, "seed": 7.0})
    assert Resolved(**vars(settings)) == RESOLVED and type(settings.steps) is int


def test_an_emptied_field_is_one_sentence():
    with pytest.raises(InputError, match="seed is empty; give a number"):
        session.settings_of({"steps": 5, "seed": None})


def test_thresholds_move_with_the_size_where_the_checkpoint_says_so(studio):
    own = studio.pipeline.resolved(OWN)
    assert session.carried(studio, 64, 64) == (own.tau1, own.tau2)
    sampling = dataclasses.replace(studio.pipeline.config.sampling, tau_tokens=4)
    studio.pipeline.config = dataclasses.replace(studio.pipeline.config, sampling=sampling)
    assert session.carried(studio, 32, 32) == (own.tau1, own.tau2)
    assert session.carried(studio, 64, 64)[1] == pytest.approx(
        2 / 3
    )  # odds 1 at four times the tokens: odds 2


def test_a_reference_that_is_gone_is_named(studio, tmp_path):
    with pytest.raises(
        InputError, match=r"my cat\.png: it is not kept here any more; add it again"
    ):
        list(
            session.draw(
                studio, "a", [Upload(tmp_path / "gone" / "reference.png", "my cat.png")], OWN
            )
        )


def test_two_runs_never_compute_at_once(studio, monkeypatch):
    """Not even when the first was stopped, whose thread goes on to the end of its step."""
    running, most, stream = [], [], Painter.stream

    def slow(self, *given, **options):
        for progress in stream(self, *given, **options):
            running.append(1)
            most.append(len(running))
            time.sleep(0.02)
            running.pop()
            yield progress

    monkeypatch.setattr(Painter, "stream", slow)
    threads = [
        threading.Thread(target=lambda: list(session.draw(studio, "a", [], Settings(steps=10))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 30 and max(most) == 1


# The command


@pytest.mark.parametrize("port", ["0", "-1", "70000"])
def test_ports_that_are_none_are_refused_before_anything_is_loaded(capsys, port):
    assert app.main(["--port", port]) == 2
    assert f"--port {port} must be from 1 to 65535" in capsys.readouterr().err


def test_without_gradio_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(app.signal, "signal", lambda *_: None)
    assert app.main([]) == 2
    assert 'pip install "squeeze_jax[app]"' in capsys.readouterr().err


def test_addresses_of_this_machine_alone():
    assert all(map(app.is_local, ("127.0.0.1", "localhost", "::1")))
    assert not any(map(app.is_local, ("0.0.0.0", "10.0.0.3", "pod")))
