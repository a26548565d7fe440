"""``python -m effdl``."""

from effdl.cli.app import main

main()
