"""`python -m upchatty` is `upchatty`."""

from upchatty.cli import main

main()
