"""`python -m data_pipelines.synthesis`: the command `baichuan-omni data synthesize`."""

import sys

from data_pipelines.synthesis.command import main

sys.exit(main())
