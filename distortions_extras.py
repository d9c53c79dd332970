"""A second tier of distortions beside the paper's 35: film, video, files and screens, 5 levels each.

Kinds that the authors' training policy used and the paper's 35 lack. They are registered apart, so that "the
35" stays the paper's count; a policy draws from them where it names the library `extras`.

    python distortions_extras.py --list
    python distortions_extras.py --sheet photo.jpg --out sheet.png
    python distortions_extras.py --apply "halftone:2" photo.jpg distorted.png
"""

from featdistill import command_line
from featdistill.distortions import command
from featdistill.distortions.libraries import EXTRAS


def main(argv: list[str] | None = None) -> int:
    """List the operations, draw a sheet of them, or apply some to an image."""
    return command.main(EXTRAS, __doc__, argv)


if __name__ == "__main__":
    command_line.run(main)
