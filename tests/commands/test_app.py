"""The page to try it on: its functions without a browser, then the page itself in headless
Chromium."""

import dataclasses
import json
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from painted_page import OWN, Painter, Visitor, served
from PIL import Image
from tiny import tiny_config

from squeeze_jax.app import session
from squeeze_jax.app.session import MAX_BYTES, MAX_REFERENCES, AppState, Upload
from squeeze_jax.app.strip import PAINT, counts, stages_of_steps, strip
from squeeze_jax.commands import app
from squeeze_jax.data.images import save_png
from squeeze_jax.errors import InputError
from squeeze_jax.sampling import png_metadata as embedded
from squeeze_jax.sampling.pipeline import Resolved, Settings
from squeeze_jax.sampling.png_metadata import Embedded, Reference, text_of

CHROMIUM = Path("/usr/bin/chromium")
RESOLVED = Resolved(
    height=32, width=48, steps=5, tau1=0.9, tau2=0.5, cfg_scale=2.5, seed=7, num_images=2
)


@pytest.fixture
def studio(tmp_path):
    return AppState(Painter(), "tiny", tmp_path)


def saved(path, text):
    save_png(path, np.zeros((32, 48, 3), np.uint8), text)
    return path


# The settings inside a picture


def test_what_is_written_is_read_back(tmp_path):
    references = (Reference("a/cät.jpg", 10, 20),)
    text = text_of('{"1": ünï\n[2]}', references, "runs/x", 300, RESOLVED, 1, ["MLLM"] * 5)
    alone = Resolved(**vars(RESOLVED) | {"seed": 8, "num_images": 1})
    found = embedded.read(saved(tmp_path / "a.png", text))
    assert found == Embedded('{"1": ünï\n[2]}', references, "runs/x", 300, alone)
    assert (
        embedded.read(saved(tmp_path / "b.png", text | {"checkpoint_step": None})).checkpoint_step
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
        embedded.read(path)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("x.png: ")


def test_foreign_pictures_are_told_from_ours(tmp_path):
    grey = Image.new("RGB", (8, 8))
    with pytest.raises(InputError, match="no settings of squeeze_jax inside"):
        embedded.read(
            saved(
                tmp_path / "other.png",
                {"prompt": '{"3": {"class_type": "KSampler"}}', "workflow": "{}"},
            )
        )
    grey.save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="this is JPEG"):
        embedded.read(tmp_path / "a.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"text\.png: cannot be read"):
        embedded.read(tmp_path / "text.png")


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


def broken_files(folder):
    """(file, a word of what is said about it)."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    noise.save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    (folder / "notes.png").write_text("hello")
    (folder / "heavy.png").write_bytes(bytes(MAX_BYTES + 1))
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("1", (8_000, 8_000)).save(folder / "large.png")
    words = {"cut.jpg": "truncated", "notes.png": "not a picture", "heavy.png": "25 MB"}
    words |= {"bomb.png": "50000000", "large.png": "8000x8000"}
    return [(folder / name, word) for name, word in words.items()]


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
        found = embedded.read(path)
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
    picture = embedded.read(tmp_path / "a.png")
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


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    with api.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(CHROMIUM), args=flags.split())
        yield chromium
        chromium.close()


def try_the_page(browser, url, folder, wait):
    """Upload, draw, see, download, restore, and a broken file; `wait` seconds at most for the
    pictures."""
    page = browser.new_page()
    page.set_default_timeout(20_000)
    outside = []
    page.on(
        "request",
        lambda request: (
            request.url.startswith((url, "data:", "blob:")) or outside.append(request.url)
        ),
    )

    def fill(name, value):
        page.fill(f"#{name} input[type=number]", value)
        page.keyboard.press("Tab")

    def says(where, text, timeout=20_000):
        page.locator(f"#{where}", has_text=text).wait_for(timeout=timeout)

    Image.new("RGB", (40, 24), "red").save(folder / "cat.png")
    page.goto(url)
    page.locator("#references input[type=file]").first.set_input_files(str(folder / "cat.png"))
    page.locator("#references .caption-label", has_text="cat.png").wait_for()
    page.fill("#prompt textarea", "a small critter running in the snow")
    fill("tau2", "0.95")
    says("strip", "is larger than tau1")
    fill("tau2", "0.45")
    fill("steps", "6")
    fill("num_images", "2")
    fill("seed", "")
    page.click("#draw")
    says("status", "seed is empty")
    fill("seed", "40")
    page.wait_for_function("document.querySelectorAll('#strip .strip span').length == 6")
    page.click("#draw")
    says("status", "2 pictures in", 1000 * wait)
    assert page.locator("#strip .strip .done").count() == 6
    images = "[...document.querySelectorAll('#pictures .thumbnail-item img')]"
    page.wait_for_function(
        f"{images}.length == 2 && {images}.every(image => image.naturalWidth > 0)"
    )
    page.locator("#pictures .thumbnail-item").nth(1).click()
    with page.expect_download() as download:
        page.locator("#pictures [aria-label=Download]").first.click()
    assert download.value.suggested_filename == "a-small-critter-running-in-the-41.png"
    download.value.save_as(folder / "saved.png")
    found = embedded.read(folder / "saved.png")
    assert found.prompt == "a small critter running in the snow"
    assert found.references[-1] == Reference("cat.png", 24, 40)
    assert (found.settings.seed, found.settings.steps, found.settings.tau2) == (41, 6, 0.45)

    page.reload()
    page.locator("#restore input[type=file]").set_input_files(str(folder / "saved.png"))
    says("restored", "add them again")
    assert "cat.png (24x40)" in page.inner_text("#restored")
    assert page.input_value("#prompt textarea") == found.prompt
    for name in ("seed", "steps", "tau1", "tau2", "cfg_scale", "height", "width", "num_images"):
        assert float(page.input_value(f"#{name} input[type=number]")) == getattr(
            found.settings, name
        ), name
    for path, word in broken_files(folder):
        page.locator("#references input[type=file]").first.set_input_files(str(path))
        says("about-references", word)
        assert path.name in page.inner_text("#about-references")
    page.click("#draw")
    says("status", "1 picture in", 1000 * wait)
    page.close()
    assert not outside


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    with served(("-m", "painted_page"), tmp_path_factory.mktemp("page")) as server:
        yield server


def test_the_page_from_upload_to_restored_settings(browser, painted, tmp_path):
    try_the_page(browser, painted.url, tmp_path, wait=30)


def test_a_full_queue_is_said_and_a_closed_page_stops_its_drawing(browser, painted):
    from squeeze_jax.app.server import MAX_WAITING

    def begin(prompt):
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.goto(painted.url)
        page.fill("#prompt textarea", prompt)
        page.fill("#steps input[type=number]", "100")
        page.keyboard.press("Tab")
        page.click("#draw")
        return page

    closed = begin("slowly, on a page that is closed")
    painted.wait_until_said("begun: slowly, on a page that is closed")
    with Visitor(painted.url) as crowd:
        for seed in range(MAX_WAITING):
            crowd.ask_to_draw("in a crowd", seed).raise_for_status()
        refused = begin("one too many")
        refused.locator("#status .wrong", has_text="too many are waiting").wait_for()
        assert refused.locator("#stop").is_disabled()
        closed.close()
        assert "seed 15" in str(list(crowd.follow()))
    refused.click("#draw")
    refused.locator("#status", has_text="1 picture in").wait_for()
    refused.close()
    assert "painted: slowly, on a page that is closed" not in painted.said()


@pytest.mark.telling
@pytest.mark.slow
def test_the_command_draws_with_the_shipped_weights(browser, tmp_path):
    with served(("-m", "squeeze_jax", "app"), tmp_path) as server:
        try_the_page(browser, server.url, tmp_path, wait=240)
