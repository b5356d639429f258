"""`python -m fedsieve` is `fedsieve`."""

from fedsieve.cli import main

main()
