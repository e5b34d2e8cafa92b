"""`python -m weightsmith` is the command `weightsmith`."""

import sys

from weightsmith.cli.main import main

sys.exit(main())
