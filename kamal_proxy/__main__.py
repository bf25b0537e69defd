"""``python -m kamal_proxy``: the same as the ``kamal-proxy`` command."""

import sys

from kamal_proxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
