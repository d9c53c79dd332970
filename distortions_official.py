"""The command line of the official distortions; they are in featdistill/distortions/."""

from featdistill import command_line
from featdistill.distortions.official import OFFICIAL, main  # noqa: F401 (the registry is this file's public name)

if __name__ == "__main__":
    command_line.run(main)
