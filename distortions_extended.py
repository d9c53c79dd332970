"""The command line of the extended distortions; they are in featdistill/distortions/."""

from featdistill import command_line
from featdistill.distortions.extended import EXTENDED, main  # noqa: F401 (the registry is this file's public name)

if __name__ == "__main__":
    command_line.run(main)
