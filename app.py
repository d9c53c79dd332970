"""A page in the browser: drop an image, see P(AI-generated), distort it, and see how the score moves.

    pip install gradio
    python app.py --experts runs/paper/stage2/*/expert
    python app.py --released weights --port 8000

It listens on this machine alone unless --host says otherwise, and sends nothing anywhere.
"""

import os
import sys

# Read once, when PyTorch is loaded: threads that wait must not keep a core busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from featdistill import command_line
from featdistill.command_line import Parser, UserError
from featdistill.inference.predictor import load_ensemble
from featdistill.interactive import page as app_page

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--experts", nargs="+", default=[], metavar="DIR", help="experts' folders")
    parser.add_argument("--released", metavar="DIR", help="folder of the authors' released experts")
    parser.add_argument(
        "--fusion", default="probability_mean", metavar="HOW", help="as for predict.py: a mean, or a file"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: a GPU where there is one)")
    parser.add_argument("--host", default=LOOPBACK[0], help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument(
        "--max-mb", type=float, default=20.0, help="largest image file that is taken, in MB of 2^20 bytes"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if not 0 < args.max_mb <= 1000:
        raise UserError(f"--max-mb must be above 0 and at most 1000, not {args.max_mb:g}")
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port must be 1 to 65535, not {args.port}")
    app_page.require_gradio()
    if args.host not in LOOPBACK:
        print(
            f"warning: everyone who reaches {args.host} can use this page; it asks for no password",
            file=sys.stderr,
        )
    predictor = load_ensemble(
        args.experts, args.released, fusion=args.fusion, device=args.device, batch_size="1", workers=0
    )
    app_page.serve(predictor, predictor.sources, args.host, args.port, int(args.max_mb * 2**20))
    return 0


if __name__ == "__main__":
    command_line.run(main)
