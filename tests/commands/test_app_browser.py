"""The page in headless Chromium, from an upload to restored settings."""

from pathlib import Path

import pytest
from painted_page import Visitor, served
from PIL import Image
from uploads import broken_files

from squeeze_jax.sampling import png_metadata
from squeeze_jax.sampling.png_metadata import Reference

CHROMIUM = Path("/usr/bin/chromium")



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
    found = png_metadata.read(folder / "saved.png")
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
