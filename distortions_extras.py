"""Distortions of film, video, files and screens beyond the paper's 35, 5 levels each.

python distortions_extras.py --list
python distortions_extras.py --sheet photo.jpg --out sheet.png
python distortions_extras.py --apply "halftone:2" photo.jpg distorted.png
"""

from functools import partial

from featdistill import command_line
from featdistill.distortions import command
from featdistill.distortions.libraries import EXTRAS

main = partial(command.main, EXTRAS, __doc__)

if __name__ == "__main__":
    command_line.run(main)
