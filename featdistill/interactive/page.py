"""The page of `app.py`: an image in, P(AI) out, and the same for the image under a distortion.

It is built with gradio, which is no requirement of the project. The page loads nothing from elsewhere. What
is uploaded is read and removed at once; pictures that are shown are removed after ten minutes, and all of
them at the end.
"""

import html
import importlib.util
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from featdistill.command_line import UserError
from featdistill.distortions.operation import LEVELS
from featdistill.images.reading import IMAGE_SUFFIXES, BrokenImage, limit_side
from featdistill.inference.predictor import Predictor, Sources
from featdistill.interactive import session as interactive

TITLE = "Is it AI-generated?"
CAUTION = """
**What a score means.** P(AI) says how much an image resembles, to these experts, the AI-generated images that
they were trained on; it is no proof. 0.9 does not mean that 9 of 10 such images are AI-generated: scores put
images in an order, they are not calibrated. An image of a new generator may score low, and a real one that
was edited, upscaled, filtered or photographed from a screen may score high. Where a mild distortion moves the
score much, trust it less. Decide nothing about a person by it.
"""
_CSS = """
table.scores { border-collapse: collapse; width: 100%; }
table.scores, table.scores :is(tr, th, td) { border: 0; }
table.scores :is(th, td) { padding: 6px; border-bottom: 1px solid var(--border-color-primary); }
table.scores th { text-align: left; }
table.scores tbody th { overflow-wrap: anywhere; min-width: 7em; }
table.scores :is(td, thead th + th) { text-align: right; font-variant-numeric: tabular-nums; }
table.scores tbody tr:first-child { font-weight: 700; }
.refused { color: var(--error-text-color); }
"""
# Pictures are shown no larger than a screen; what is scored is the whole image.
_SHOWN_SIDE_PX = 1024
_KEPT_S = 600
_LOOK_EVERY_S = 60
# Sessions whose image is kept in memory, for the next distortion.
_SESSIONS = 32


def require_gradio() -> None:
    """Raise a `UserError` that says what to do unless a version of gradio that serves is installed."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("app.py needs the package gradio; run pip install gradio")
    # Read when gradio is imported: nothing is to be sent anywhere.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    if int(gradio.__version__.split(".")[0]) < 6:
        raise UserError(f"app.py needs gradio 6, not {gradio.__version__}; run pip install -U gradio")


def serve(predictor: Predictor, sources: Sources, host: str, port: int, most_bytes: int) -> None:
    """Show the page until it is interrupted.

    Args:
        host: what address is listened on.
        most_bytes: of an image that is taken.

    Raises:
        UserError: gradio is missing, or host and port cannot be listened on.
    """
    require_gradio()
    import gradio

    with tempfile.TemporaryDirectory(prefix="featdistill-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        page = build_page(predictor, sources, most_bytes)
        page.queue(max_size=_SESSIONS)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                max_file_size=most_bytes,
                theme=gradio.themes.Default(**fonts),
                css=_CSS,
                share=False,
                ssr_mode=False,
                enable_monitoring=False,
                footer_links=[],
                run_history=False,
                state_session_capacity=_SESSIONS,
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"{host}:{port} cannot be listened on; give another --port or --host") from error
        print(f"the page is at {page.local_url}; Ctrl-C ends it")
        # Else what is temporary would stay behind when a service manager ends the program.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        page.block_thread()


def build_page(predictor: Predictor, sources: Sources, most_bytes: int) -> Any:
    """Return the page as gradio's `Blocks`."""
    import gradio as gr

    names = interactive.operation_names()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_LOOK_EVERY_S, _KEPT_S)) as page:
        gr.Markdown(f"# {TITLE}")
        gr.Markdown(CAUTION)
        kept = gr.State(None, time_to_live=_KEPT_S)
        drop = gr.File(
            label=f"Image, at most {most_bytes / 2**20:g} MB", file_types=list(IMAGE_SUFFIXES), height=140
        )
        message = gr.HTML(_said("Drop an image."), elem_id="message")
        scores = gr.HTML(elem_id="scores")
        with gr.Row():
            # Wide enough to stand one below the other on a phone.
            wide = {"min_width": 280}
            distortion = gr.Dropdown(list(names), value=names[0], label="Distortion", filterable=True, **wide)
            level = gr.Slider(LEVELS[0], LEVELS[-1], value=LEVELS[2], step=1, label="Level", **wide)
        what = gr.Markdown(interactive.describe(names[0], LEVELS[2]))
        apply = gr.Button("Distort and score", elem_id="distort")
        with gr.Row():
            fixed = {"format": "png", "interactive": False, "buttons": []}
            before = gr.Image(label="As it is", alt_text="The image as it is", elem_id="before", **fixed)
            after = gr.Image(label="Distorted", alt_text="The distorted image", elem_id="after", **fixed)
        with gr.Accordion("Experts", open=False):
            gr.Markdown("\n".join(f"- {name}: {source['backbone']}" for name, source in sources.items()))

        def upload(path: str | None) -> tuple:
            return (None, *_upload(predictor, path, most_bytes))

        def distort(known: tuple | None, name: str, strength: float) -> tuple:
            return _distort(predictor, known, name, int(strength), most_bytes)

        # One image at a time: the experts' device is shared.
        alone = {"concurrency_limit": 1, "concurrency_id": "experts", "api_visibility": "private"}
        drop.upload(upload, drop, [drop, kept, message, scores, before, after], **alone)
        apply.click(distort, [kept, distortion, level], [message, scores, after], **alone)
        for control in (distortion, level):
            control.change(
                lambda name, strength: interactive.describe(name, int(strength)),
                [distortion, level],
                what,
                show_progress="hidden",
                api_visibility="private",
            )
    return page


def _upload(predictor: Predictor, path: str | None, most_bytes: int) -> tuple:
    """Return what is kept, the message, the scores, and both pictures, for a file that was uploaded.

    What is kept is the file's bytes, which are fewer than the pixels, and its scores.
    """
    if path is None:
        return None, _said("Drop an image."), "", None, None
    file = Path(path)
    try:
        # Not more than needed to see that it is too large.
        with file.open("rb") as opened:
            data = opened.read(most_bytes + 1)
        image = interactive.open_image(data, most_bytes)
    except BrokenImage as error:
        return None, _refused(f"{file.name} could not be read: {error}"), "", None, None
    finally:
        file.unlink(missing_ok=True)
    height, width = image.shape[:2]
    scores = interactive.score(predictor, image)
    said = _said(f"{file.name}, {width} x {height} px: P(AI) {interactive.shown(scores.fused)}")
    return (data, scores), said, interactive.score_table(scores), _picture(image), None


def _distort(predictor: Predictor, known: tuple | None, name: str, level: int, most_bytes: int) -> tuple:
    """Return the message, the scores and the distorted picture, for what `_upload` has kept."""
    if known is None:
        return _refused("Drop an image first."), "", None
    data, scores = known
    try:
        distorted = interactive.distort(interactive.open_image(data, most_bytes), name, level)
    except (BrokenImage, UserError) as error:
        return _refused(str(error)), interactive.score_table(scores), None
    found = interactive.score(predictor, distorted)
    moved = f"from {interactive.shown(scores.fused)} to {interactive.shown(found.fused)}"
    said = _said(f"{name}, level {level}: P(AI) {moved}")
    return said, interactive.score_table(scores, found), _picture(distorted)


def _picture(image: np.ndarray) -> np.ndarray:
    return limit_side(image, _SHOWN_SIDE_PX)


def _said(text: str) -> str:
    return f'<p role="status">{html.escape(text)}</p>'


def _refused(text: str) -> str:
    return f'<p role="alert" class="refused">{html.escape(text)}</p>'
