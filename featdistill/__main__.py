"""The tools of the package: `python -m featdistill` lists them."""

import importlib
import sys

from featdistill import command_line
from featdistill.command_line import UserError

# By name: the module whose `main` it is, and what it does.
TOOLS = {
    "backbones": ("models.backbones", "list the backbones, or show what one of them is"),
    "convert": ("models.released", "turn the authors' released experts into expert folders"),
    "explain": ("interactive.explain", "draw which parts of an image an expert looks at"),
    "fuse": (
        "inference.fusion_fit",
        "fit the weights and temperatures of an ensemble on labels",
    ),
    "plot": ("training.plot_run", "plot the training curves of one or more runs"),
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m featdistill TOOL [arguments]\n\nTOOL --help shows the arguments of a tool.\n")
        for name, (_, purpose) in TOOLS.items():
            print(f"  {name:10} {purpose}")
        return 0
    if argv[0] == "--debug":
        raise UserError("--debug goes behind the name of a tool")
    tool = command_line.one_of("tool", argv[0], TOOLS)
    sys.argv = [f"python -m featdistill {tool}", *argv[1:]]
    return importlib.import_module(f"featdistill.{TOOLS[tool][0]}").main(argv[1:])


if __name__ == "__main__":
    command_line.run(main)
