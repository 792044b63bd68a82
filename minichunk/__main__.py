"""`python -m minichunk`: the command."""

import sys

from .command.main import main

sys.exit(main())
