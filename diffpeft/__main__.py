"""`python -m diffpeft`."""

from diffpeft.cli import main

main()
