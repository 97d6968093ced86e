"""Runs a script with accelerate's FSDP on the CPU: accelerate shards on accelerators alone, so it is told that this is one."""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


initialise = PartialState.__init__


def initialise_and_pretend(self, *args, **kwargs) -> None:
    initialise(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = initialise_and_pretend
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
