"""All rules of a configuration, checked together: a user sees every violation at once, not one a run.

Single values are checked against the range in the schema; rules across fields are the small named functions in
`layout_rules.py` and `run_rules.py`. Everything is pure: a number of processes goes in, sentences come out.
"""

from collections.abc import Sequence

from megatron_llm.config.fields import all_fields
from megatron_llm.config.layout_rules import LAYOUT_RULES
from megatron_llm.config.run_rules import RUN_RULES
from megatron_llm.config.schema import RunConfig
from megatron_llm.utils.errors import UserError

RULES = (*LAYOUT_RULES, *RUN_RULES)


def out_of_range(config: RunConfig) -> list[str]:
    """A sentence for each single value outside its range."""
    found = []
    for spec in all_fields():
        value = getattr(getattr(config, spec.section), spec.name)
        if spec.kind not in (int, float) or value is None:
            continue
        wrong = [item for item in (value if spec.is_list else [value]) if not spec.bounds.contains(item)]
        found += [f"{spec.name} must be {spec.bounds.text()}, got {item}" for item in wrong]
    return found


def violations(config: RunConfig, world_size: int) -> list[str]:
    """Every sentence of every rule that a configuration with filled-in defaults breaks on `world_size` processes."""
    across = [sentence for rule in RULES if (sentence := rule(config, world_size)) is not None]
    return out_of_range(config) + across


def check(config: RunConfig, world_size: int, more: Sequence[str] = ()) -> None:
    """Raise one UserError that lists all violations and the sentences in `more`, numbered; return when there are none."""
    found = [*violations(config, world_size), *more]
    if len(found) == 1:
        raise UserError(f"the configuration cannot run: {found[0]}")
    if found:
        lines = [f"  {number}. {sentence}" for number, sentence in enumerate(found, 1)]
        raise UserError(f"the configuration cannot run, {len(found)} things are wrong:\n" + "\n".join(lines))
