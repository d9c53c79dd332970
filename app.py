"""A page in the browser that scores an image, and scores it again under a distortion.

    pip install gradio
    python app.py --experts runs/paper/stage2/*/expert
    python app.py --released weights --port 8000

It is reachable from this machine only, unless --host says otherwise, and sends nothing anywhere.
"""

import logging
import os

# Read once, when PyTorch is loaded: idle threads must not keep a core busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from featdistill import command_line
from featdistill.command_line import Parser, within
from featdistill.inference.flags import add_flags, load_settings

_log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    add_flags(parser, "experts", "released", "fusion", "tta", "calibrator", "device")
    parser.add_argument("--host", default=LOOPBACK[0], help="address to listen on")
    parser.add_argument("--port", type=within(1, 65535), default=7860, help="port to listen on")
    parser.add_argument(
        "--max-mb",
        type=within(0.001, 1000, float),
        default=20.0,
        help="largest image file, in MB of 2^20 bytes",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    # Imported here, so that --help answers at once.
    from featdistill.images.credentials import has_credentials
    from featdistill.inference.detector import Detector
    from featdistill.interactive import page

    page.require_gradio()
    if args.host not in LOOPBACK:
        _log.warning("everyone who can reach %s can use this page; it has no password", args.host)
    detector = Detector.load(
        *args.experts,
        **load_settings(args),
        batch_size=1,
        calibrator=args.calibrator,
        credentials=has_credentials(),
    )
    page.serve(detector, args.host, args.port, int(args.max_mb * 2**20))


if __name__ == "__main__":
    command_line.run(main)
