"""The former name of `python -m data_prep.equalize`, which still works."""

from data_prep.equalize import main
from featdistill import command_line

if __name__ == "__main__":
    command_line.run(main)
