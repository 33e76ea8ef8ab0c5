"""Run the command line: ``python -m rtfmri``."""

from rtfmri.cli import main

main()
