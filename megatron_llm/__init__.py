"""Pretraining of GPT and LLaMA models with tensor, pipeline and data parallelism.

This module stays light: importing it loads neither torch nor any other dependency, so that `--help`, version checks and
packaging are quick. Import what is needed from the sub-packages; docs/design/architecture.md says which is which.
"""

__version__ = "0.1.0"
