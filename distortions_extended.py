"""The paper's extended library: 35 distortions in 8 categories, 5 levels each (section 4.2).

python distortions_extended.py --list
python distortions_extended.py --sheet photo.jpg --out sheet.png
python distortions_extended.py --apply "fog:3,motion_blur:2" photo.jpg distorted.png
"""

from functools import partial

from featdistill import command_line
from featdistill.distortions import command
from featdistill.distortions.libraries import EXTENDED

main = partial(command.main, EXTENDED, __doc__)

if __name__ == "__main__":
    command_line.run(main)
