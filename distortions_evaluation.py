"""The challenge's other transformations: what its evaluation images went through besides the official 12.

python distortions_evaluation.py --list
python distortions_evaluation.py --sheet photo.jpg --out sheet.png
python distortions_evaluation.py --apply "downscale:3,avif:2" photo.jpg distorted.png
"""

from functools import partial

from featdistill import command_line
from featdistill.distortions import command
from featdistill.distortions.evaluation import EVALUATION

main = partial(command.main, EVALUATION, __doc__)

if __name__ == "__main__":
    command_line.run(main)
