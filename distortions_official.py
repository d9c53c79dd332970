"""The challenge's official training distortions: 12 operations in 7 groups, 5 levels each, on uint8 images.

They give what the organisers' released functions give, quirks included, because the evaluation images went
through that code. Its plain faults are not reproduced: crashes, writing to the input, and a jitter that moves
the whole image. Between the steps of a composition the image is rounded to 8 bits; the released code keeps
floats.

    python distortions_official.py --list
    python distortions_official.py --sheet photo.jpg --out sheet.png
    python distortions_official.py --apply "jpeg:3,gausblur:2" photo.jpg distorted.png
"""

from featdistill import command_line
from featdistill.distortions import command
from featdistill.distortions.official import OFFICIAL


def main(argv: list[str] | None = None) -> int:
    """List the operations, draw a sheet of them, or apply some to an image."""
    return command.main(OFFICIAL, __doc__, argv)


if __name__ == "__main__":
    command_line.run(main)
