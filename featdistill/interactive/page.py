"""The page of `app.py`: score an image, and score it again under a distortion.

It is built with gradio, an optional dependency, and loads nothing from other hosts. An upload is deleted as
soon as it is read; pictures that are shown are deleted after ten minutes, or when the program ends.
"""

import html
import importlib.util
import logging
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

from featdistill.calibration.stability import DEFAULT_COPIES, Request
from featdistill.command_line import UserError
from featdistill.distortions.operation import LEVELS
from featdistill.images.formats import IMAGE_SUFFIXES
from featdistill.images.reading import BrokenImage, limit_side
from featdistill.inference.detector import Detector
from featdistill.interactive import session

_log = logging.getLogger(__name__)

TITLE = "Is it AI-generated?"
CAUTION = """
**How to read the score.** P(AI) is a score from 0 (real) to 1 (AI-generated): it says how much an image
resembles the AI-generated images that these experts were trained on. It is not proof. A score of 0.9 does not
mean that 9 of 10 such images are AI-generated: scores rank images, and are not calibrated. A verdict is shown
where a calibrator is given; its promise is about many images, not about one. Images of a new
generator may score low. Real images that were edited, upscaled, filtered or photographed from a screen may
score high. If a mild distortion changes the score a lot, trust it less. Do not base a decision about a person
on it.
"""
DELIVERIES = """
Copies are what messengers and sites make of a picture: thumbnails, screenshots, JPEG, WebP and AVIF. If the
verdict or the score changes much, do not rely on it.
"""
# Pictures are shrunk to the size of a screen to be shown; scores are those of the whole image.
_SHOWN_SIDE_PX = 1024
_DELETE_AFTER_S = 600
_DELETE_EVERY_S = 60
# Sessions whose image is kept in memory, to be distorted.
_SESSIONS = 32


def require_gradio() -> None:
    """Raise a `UserError` that says what to do unless gradio is installed in a version that is supported."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("app.py needs the package gradio; run pip install gradio")
    # gradio reads it when it is imported: nothing is sent anywhere.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    if int(gradio.__version__.split(".")[0]) < 6:
        raise UserError(f"app.py needs gradio 6, not {gradio.__version__}; run pip install -U gradio")


def serve(detector: Detector, host: str, port: int, max_bytes: int) -> None:
    """Show the page until the program is interrupted; refuse image files of more than `max_bytes`.

    Raises:
        UserError: gradio is missing, or it is not possible to listen on host and port.
    """
    require_gradio()
    import gradio

    with tempfile.TemporaryDirectory(prefix="featdistill-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        page = build_page(detector, max_bytes)
        page.queue(max_size=_SESSIONS)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                max_file_size=max_bytes,
                theme=gradio.themes.Default(**fonts),
                css_paths=[Path(__file__).with_name("page.css")],
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
            raise UserError(f"cannot listen on {host}:{port}; choose another --port or --host") from error
        _log.info("the page is at %s; Ctrl-C stops it", page.local_url)
        # Otherwise temporary files would remain when a service manager stops the program.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        page.block_thread()


def build_page(detector: Detector, max_bytes: int) -> Any:
    """Return the page as gradio's `Blocks`."""
    import gradio as gr

    names = session.operation_names()
    delete_cache = (_DELETE_EVERY_S, _DELETE_AFTER_S)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=delete_cache) as page:
        gr.Markdown(f"# {TITLE}")
        gr.Markdown(CAUTION)
        uploaded = gr.State(None, time_to_live=_DELETE_AFTER_S)
        drop = gr.File(
            label=f"Image, at most {max_bytes / 2**20:g} MB", file_types=list(IMAGE_SUFFIXES), height=140
        )
        message = gr.HTML(_status("Drop an image."), elem_id="message")
        judgment = gr.HTML(elem_id="judgment")
        scores = gr.HTML(elem_id="scores")
        deliver = gr.Button(f"Score {DEFAULT_COPIES} re-delivered copies", elem_id="deliver")
        stability = gr.HTML(elem_id="stability")
        gr.Markdown(DELIVERIES)
        with gr.Row():
            # On a phone, too wide to be next to each other.
            wide = {"min_width": 280}
            distortion = gr.Dropdown(list(names), value=names[0], label="Distortion", filterable=True, **wide)
            level = gr.Slider(LEVELS[0], LEVELS[-1], value=LEVELS[2], step=1, label="Level", **wide)
        description = gr.Markdown(session.describe(names[0], LEVELS[2]))
        apply = gr.Button("Distort and score", elem_id="distort")
        with gr.Row():
            fixed = {"format": "png", "interactive": False, "buttons": []}
            before = gr.Image(label="Original", alt_text="The original image", elem_id="before", **fixed)
            after = gr.Image(label="Distorted", alt_text="The distorted image", elem_id="after", **fixed)
        with gr.Accordion("Experts", open=False):
            experts = detector.predictor.sources.items()
            gr.Markdown("\n".join(f"- {name}: {source['backbone']}" for name, source in experts))

        def on_upload(path: str | None) -> tuple:
            return (None, *score_upload(detector, path, max_bytes), "")

        def on_distort(image: tuple | None, name: str, level: float) -> tuple:
            return score_distorted(detector, image, name, int(level), max_bytes)

        # One image at a time: all sessions share the device of the experts.
        alone = {"concurrency_limit": 1, "concurrency_id": "experts", "api_visibility": "private"}
        shown = [drop, uploaded, message, judgment, scores, before, after, stability]
        drop.upload(on_upload, drop, shown, **alone)
        deliver.click(lambda image: score_copies(detector, image), uploaded, stability, **alone)
        apply.click(on_distort, [uploaded, distortion, level], [message, scores, after], **alone)
        for control in (distortion, level):
            control.change(
                lambda name, level: session.describe(name, int(level)),
                [distortion, level],
                description,
                show_progress="hidden",
                api_visibility="private",
            )
    return page


def score_upload(detector: Detector, path: str | None, max_bytes: int) -> tuple:
    """Score an uploaded file and delete it.

    Returns:
        For `score_distorted` the file's bytes, which are fewer than those of its pixels, with the scores; the
        message, the verdict and the credentials, the table of scores, and both pictures.
    """
    if path is None:
        return None, _status("Drop an image."), "", "", None, None
    file = Path(path)
    try:
        # One byte more than allowed is enough to refuse it.
        with file.open("rb") as opened:
            data = opened.read(max_bytes + 1)
        image = session.open_image(data, max_bytes)
    except BrokenImage as error:
        return None, _alert(f"{file.name} could not be read: {error}"), "", "", None, None
    finally:
        file.unlink(missing_ok=True)
    height, width = image.shape[:2]
    (scores,) = detector.rows([data], [file.name])
    message = _status(f"{file.name}, {width} x {height} px: P(AI) {session.shown(scores.score)}")
    table, picture = session.score_table(scores), limit_side(image, _SHOWN_SIDE_PX)
    return (data, scores), message, session.judgment(scores), table, picture, None


def score_copies(detector: Detector, uploaded: tuple | None) -> str:
    """Score re-delivered copies of an upload; return what became of its score."""
    if uploaded is None:
        return _alert("Drop an image first.")
    data, clean = uploaded
    copies = Detector(detector.predictor, detector.calibrator, Request(DEFAULT_COPIES))
    stability = copies.rows([data], [clean.name])[0].stability
    return (
        _status(stability.sentence())
        if stability
        else _alert("The image is too small to be delivered again.")
    )


def score_distorted(
    detector: Detector, uploaded: tuple | None, name: str, level: int, max_bytes: int
) -> tuple:
    """Distort and score an upload; return the message, the table of scores, and the distorted picture."""
    if uploaded is None:
        return _alert("Drop an image first."), "", None
    data, clean = uploaded
    try:
        image = session.distort(session.open_image(data, max_bytes), name, level)
    except (BrokenImage, UserError) as error:
        return _alert(str(error)), session.score_table(clean), None
    distorted = detector(image)
    change = f"from {session.shown(clean.score)} to {session.shown(distorted.score)}"
    message = _status(f"{name}, level {level}: P(AI) {change}")
    return message, session.score_table(clean, distorted), limit_side(image, _SHOWN_SIDE_PX)


def _status(text: str) -> str:
    return f'<p role="status">{html.escape(text)}</p>'


def _alert(text: str) -> str:
    return f'<p role="alert" class="refused">{html.escape(text)}</p>'
