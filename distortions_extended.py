"""The paper's extended library: 35 distortions in 8 categories, 5 levels each, on uint8 images.

Each is modelled on what happens to light, sensor, file or scene; the modules of `featdistill/extended/`, one
for each category, say how. The categories are the paper's (section 4.2); where it names a distortion, it is
here under that name. The paper gives no parameters, so models and levels are ours.

    python distortions_extended.py --list
    python distortions_extended.py --sheet photo.jpg --out sheet.png
    python distortions_extended.py --apply "fog:3,motion_blur:2" photo.jpg distorted.png
"""

from featdistill import command_line
from featdistill.distortions import command
from featdistill.distortions.libraries import EXTENDED


def main(argv: list[str] | None = None) -> int:
    """List the operations, draw a sheet of them, or apply some to an image."""
    return command.main(EXTENDED, __doc__, argv)


if __name__ == "__main__":
    command_line.run(main)
