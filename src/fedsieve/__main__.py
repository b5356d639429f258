"""`python -m fedsieve` is `fedsieve`.

Python puts the current folder before all others then, as the command does not: what lies there, a
folder that somebody sent perhaps, would be imported in the place of what is installed.
"""

import sys

if not sys.flags.safe_path:
    del sys.path[0]

from fedsieve.cli import main

main()
