"""What the process that ranks are forked from imports: all that pretraining needs, without looking for garbage in it.

Importing leaves some hundred thousand objects and nothing to collect, so the collector is off meanwhile, and what is there
at the end is left alone by it from then on: ranks do not look through it again, nor copy its pages by doing so. For that
process only: importing this module changes the collector of whoever does.
"""

import gc
from importlib import import_module

gc.disable()
import_module("megatron_llm.training.pretrain")
gc.freeze()
gc.enable()
