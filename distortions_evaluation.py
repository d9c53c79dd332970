"""The challenge's other transformations: what its evaluation images went through beside the official 12.

The challenge names these operations without publishing their code. Where a name suggests an Albumentations
operator (clahe, isonoise, perspective, randomtonecurve, rgbshift), that is what is built here; where it
suggests ARNIQA's set (motionblur, multnoise, pixelate, jpeg2000), its ranges are taken. WebP and AVIF stand
in for the neural codecs, and two watermarks of our own design for the challenge's seven. What needs a network
of someone else's is listed too, and is applied where a package provides it.

    python distortions_evaluation.py --list
    python distortions_evaluation.py --sheet photo.jpg --out sheet.png
    python distortions_evaluation.py --apply "downscale:3,avif:2" photo.jpg distorted.png
"""

from featdistill import command_line
from featdistill.distortions import command
from featdistill.distortions.evaluation import EVALUATION


def main(argv: list[str] | None = None) -> int:
    """List the operations, draw a sheet of them, or apply some to an image."""
    return command.main(EVALUATION, __doc__, argv)


if __name__ == "__main__":
    command_line.run(main)
