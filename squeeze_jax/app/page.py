"""The page itself: components, where they stand, and which function of `session` each of them
calls."""

import html
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]  # the extra `app`

from squeeze_jax.app import session
from squeeze_jax.app.session import AppState, Upload
from squeeze_jax.errors import InputError
from squeeze_jax.interop.load import DEMO
from squeeze_jax.sampling import png_metadata as embedded
from squeeze_jax.sampling.pipeline import Settings

EXAMPLE = DEMO / "references" / "critter-0.png"
EXAMPLE_PROMPT = "a big critter jumping on the beach at sunset, with a red balloon, on the left"
"""What the page begins with on the shipped miniature."""
LABELS = {
    "tau1": "τ1",
    "tau2": "τ2",
    "cfg_scale": "CFG (1 is off)",
    "steps": "Steps",
    "height": "Height",
    "width": "Width",
    "num_images": "Images",
    "seed": "Seed (of the first image)",
}
THEME = gr.themes.Default(primary_hue="blue")  # pyright: ignore[reportPrivateImportUsage]
KEPT = 24 * 3600
"""Seconds that uploads and pictures stay."""
STYLE = """
.gradio-container {
  width: 100% !important; max-width: 1160px !important; margin: 0 auto !important;
}
#pictures { min-height: 280px; }
#references .grid-wrap, #pictures .grid-wrap { padding-top: 28px; max-height: none; }
.notice { font-size: 14px; }
.notice.wrong { color: #c62828; }
.dark .notice.wrong { color: #ff8a80; }
.small img { image-rendering: pixelated; }
"""


def notice(sentences: str | list[str], wrong: bool = False) -> gr.HTML:
    """Something said to the user; hidden while there is nothing."""
    lines = [sentences] if isinstance(sentences, str) else sentences
    text = "<br>".join(html.escape(line) for line in lines)
    return gr.HTML(
        f'<div class="notice{" wrong" if wrong else ""}" role="status">{text}</div>',
        visible=bool(text),
    )


def held(gallery: list[tuple[str, str | None]] | None) -> list[Upload]:
    """What the references' gallery holds; a fresh upload is called as its file."""
    return [Upload(Path(path), caption or Path(path).name) for path, caption in gallery or []]


def shown(pictures: list[Any]) -> gr.Gallery:
    """Previews, or files captioned with their seeds, in about as many columns as rows."""
    items = [
        (str(p), f"seed {p.stem.rsplit('-', 1)[-1]}") if isinstance(p, Path) else p
        for p in pictures
    ]
    return gr.Gallery(items, columns=math.ceil(math.sqrt(len(items))))


def build(studio: AppState) -> gr.Blocks:
    """The page over a studio."""
    own = vars(studio.pipeline.resolved(Settings()))
    checkpoint, demo = studio.checkpoint, studio.checkpoint == "demo"
    small = ["small"] if max(own["height"], own["width"]) < 256 else []

    def take(gallery: Any) -> tuple[Any, gr.HTML]:
        good, wrong = session.accept(held(gallery), studio.folder)
        return [(str(upload.path), upload.name) for upload in good], notice(wrong, wrong=True)

    def preview_plan(gallery: Any, *values: int | float | None) -> str | gr.HTML:
        try:
            return session.plan(
                studio, session.settings_of(dict(zip(LABELS, values))), len(gallery or ())
            )
        except InputError as error:
            return notice(str(error), wrong=True)

    def run(prompt: str, gallery: Any, *values: int | float | None) -> Iterator[tuple[Any, ...]]:
        # Each update is whole: of several that come at once, the browser shows the last alone.
        try:
            settings = session.settings_of(dict(zip(LABELS, values)))
            for view in session.draw(studio, prompt, held(gallery), settings):
                pictures = gr.skip() if view.pictures is None else shown(view.pictures)
                yield (
                    pictures,
                    view.strip,
                    notice(view.said),
                    gr.Button(interactive=not view.finished),
                )
        except InputError as error:
            yield gr.skip(), gr.skip(), notice(str(error), wrong=True), gr.Button(interactive=False)

    def waiting() -> tuple[Any, ...]:
        return notice("Waiting for its turn …"), gr.Button(interactive=True)

    def carry(
        height: float | None, width: float | None, tau1: Any, tau2: Any, before: list[float]
    ) -> list[Any]:
        """τ at another size; what the user has moved stays."""
        try:
            after = session.carried(studio, int(height or 0), int(width or 0))
        except InputError:
            return [gr.skip(), gr.skip(), before]
        moved = [
            value is None or abs(value - own) > 0.005 for value, own in zip((tau1, tau2), before)
        ]
        return [*(gr.skip() if stays else own for stays, own in zip(moved, after)), list(after)]

    def stopped() -> tuple[Any, ...]:
        return notice("Stopped; what is shown is unfinished."), gr.Button(interactive=False)

    def failed() -> tuple[Any, ...]:
        """The queue was full, or something broke."""
        said = (
            "Nothing was drawn: too many are waiting, or it failed (the terminal says why); "
            "try again in a minute."
        )
        return notice(said, wrong=True), gr.Button(interactive=False)

    def bring_back(path: str | None) -> list[Any]:
        if path is None:
            return [gr.skip() for _ in range(len(LABELS) + 1)] + [notice("")]
        try:
            picture = embedded.read(path)
            values, notes = session.restore(studio, picture)
        except InputError as error:
            return [gr.skip() for _ in range(len(LABELS) + 1)] + [notice(str(error), wrong=True)]
        return [
            picture.prompt,
            *(values.get(name, gr.skip()) for name in LABELS),
            notice(["Settings restored.", *notes]),
        ]

    with gr.Blocks(
        title="squeeze_jax", analytics_enabled=False, delete_cache=(3600, KEPT), fill_width=True
    ) as page:
        gr.Markdown(
            "# squeeze_jax\nPictures of a subject, and a sentence about what it does. "
            f"Checkpoint: {checkpoint}"
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=9):
                references = gr.Gallery(
                    [(str(EXAMPLE), EXAMPLE.name)] if demo else None,
                    label=f"References ({session.LIMITS})", interactive=True,
                    columns=session.MAX_REFERENCES, fit_columns=False, height=170,
                    object_fit="contain", elem_id="references", elem_classes=small,
                    sources=["upload"], file_types=["file"],
                )  # fmt: skip
                about_references = gr.HTML(visible=False, elem_id="about-references", padding=False)
                prompt = gr.Textbox(
                    EXAMPLE_PROMPT if demo else "", label="Prompt", lines=2, elem_id="prompt",
                    placeholder="what the picture should show",
                )  # fmt: skip
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Stop", interactive=False, elem_id="stop")
                sliders = []
                for names in zip(list(LABELS)[::2], list(LABELS)[1::2]):
                    with gr.Row():
                        for name in names:
                            low, high, step = studio.ranges[name]
                            kind = partial(gr.Number, precision=0) if name == "seed" else gr.Slider
                            common = {
                                "value": own[name],
                                "label": LABELS[name],
                                "step": step,
                                "elem_id": name,
                            }
                            sliders.append(kind(minimum=low, maximum=high, **common))
            with gr.Column(scale=8):
                pictures = gr.Gallery(
                    label="Pictures (PNG, settings inside)", interactive=False, format="png",
                    object_fit="contain", elem_id="pictures", elem_classes=small,
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                strip = gr.HTML(
                    session.plan(studio, Settings(), int(demo)), elem_id="strip", padding=False
                )
                status = gr.HTML(visible=False, elem_id="status", padding=False)
                picture = gr.File(
                    label="Drop a picture made here to restore its settings", height=160,
                    elem_id="restore",
                )  # fmt: skip
                restored = gr.HTML(visible=False, elem_id="restored", padding=False)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        references.upload(take, references, [references, about_references], **quiet)
        asked = gr.on(
            [go.click, prompt.submit], waiting, None, [status, stop], queue=False, **quiet
        )
        drawing_now = asked.then(
            run,
            [prompt, references, *sliders],
            [pictures, strip, status, stop],
            concurrency_limit=1,
            **quiet,
        )
        drawing_now.failure(failed, None, [status, stop], queue=False, **quiet)
        stop.click(
            stopped, None, [status, stop], cancels=[drawing_now], queue=False, **quiet
        )  # fmt: skip
        picture.change(bring_back, picture, [prompt, *sliders, restored], **quiet)
        if studio.pipeline.config.sampling.tau_tokens:
            by_name = dict(zip(LABELS, sliders))
            sizes, taus = [by_name["height"], by_name["width"]], [by_name["tau1"], by_name["tau2"]]
            before = gr.State([own["tau1"], own["tau2"]])
            gr.on(
                [slider.change for slider in sizes], carry, [*sizes, *taus, before],
                [*taus, before], trigger_mode="always_last", queue=False, **quiet,
            )  # fmt: skip
        gr.on(
            [slider.change for slider in sliders] + [references.change],
            preview_plan, [references, *sliders], strip, trigger_mode="always_last", queue=False,
            **quiet,
        )  # fmt: skip
    return page
