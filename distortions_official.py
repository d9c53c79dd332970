"""The challenge's official training distortions: 12 operations in 7 groups, 5 levels each.

python distortions_official.py --list
python distortions_official.py --sheet photo.jpg --out sheet.png
python distortions_official.py --apply "jpeg:3,gausblur:2" photo.jpg distorted.png
"""

from functools import partial

from featdistill import command_line
from featdistill.distortions import command
from featdistill.distortions.official import OFFICIAL

main = partial(command.main, OFFICIAL, __doc__)

if __name__ == "__main__":
    command_line.run(main)
