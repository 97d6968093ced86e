"""The command `python -m minimind_v_hf.data`."""

import sys

from .check import main


sys.exit(main())
