"""The help of the tools: first a command that works, then what the tool does, then its flags."""

import argparse


def tool_parser(description: str | None, *examples: str) -> argparse.ArgumentParser:
    """A parser without flags yet. `description` is the tool's docstring, `examples` are commands to begin with.

    Abbreviations are off: a flag added tomorrow cannot change the meaning of a command of today.
    """
    shown = "".join(f"  {example}\n" for example in examples)
    return argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=f"example:\n{shown}\n{description or ''}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
