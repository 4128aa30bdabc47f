"""The families by name: one line each."""

from megatron_llm.models.families import gpt, llama
from megatron_llm.models.family import Family
from megatron_llm.utils.errors import UserError


def families() -> dict[str, Family]:
    """Every known family by name."""
    return {family.name: family for family in (gpt.FAMILY, llama.FAMILY)}


def get_family(name: str) -> Family:
    """The family called `name`; UserError listing the known ones otherwise."""
    known = families()
    if name not in known:
        raise UserError(f"model family {name!r} is not known; choose one of {', '.join(sorted(known))} with --model")
    return known[name]
