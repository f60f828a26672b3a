"""Say in one line that this Python is too old, where pip would say it in forty: README's commands begin with it.

Runs on every Python from 2.7, so it has nothing that old ones cannot parse.
"""

import sys

OLDEST = (3, 11)

if sys.version_info < OLDEST:
    sys.exit(
        "mlx_flash needs Python {}.{} or later, and {} is Python {}.{} (Xcode's command line tools bring 3.9). "
        "Install a newer one, from python.org or with `brew install python@3.13`, and put its name, such as "
        "python3.13, where the command says python3.".format(*(OLDEST + (sys.executable,) + sys.version_info[:2]))
    )
