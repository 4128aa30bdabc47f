"""Base and adapters to one Hugging Face folder, shard by shard, and proven before it gets its name.

When the proof fails or could not run, what was written is kept beside the asked place as `<name>.rejected`; for any other
error nothing is left. What was there before stays in both cases. The report lies in the folder as `merge_report.json`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_llm import __version__
from megatron_llm.checkpoint.hf_folder import CONFIG
from megatron_llm.checkpoint.tensor_file import dtype_from_name, dtype_name, seal_file
from megatron_llm.lora.adapter import Adapter
from megatron_llm.lora.base import Base
from megatron_llm.lora.merge_documents import TokenizerSource, choose_tokenizer, copied_files, write_documents
from megatron_llm.lora.merge_plan import Plan, make_plan
from megatron_llm.lora.merge_proof import MergeComparison, compare_merged
from megatron_llm.lora.merge_weights import WrittenWeights, change_table, output_specs, tied_after, write_weights
from megatron_llm.utils.atomic import atomic_folder, write_json
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.json_files import read_json
from megatron_llm.utils.progress import Progress

REPORT = "merge_report.json"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    dtype            type of the written weights, one of DTYPES; None: as the base's
    max_shard_bytes  size of a file of weights at most
    verify           compare logits with base and adapters before the folder gets its name
    overwrite        replace the folder even when it is no earlier merge
    base_label       what the report calls the base, where that is not the name of its folder
    """

    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    verify: bool = True
    overwrite: bool = False
    base_label: str | None = None


def merge(
    base: Path | str,
    adapters: Sequence[tuple[Path | str, float]],
    save: Path | str,
    options: MergeOptions,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Merge adapters, each with its weight, in their order into the model in `base`; returns the report in the folder `save`.

    An earlier merge of the very same inputs is left as it is. UserError when base and adapters do not belong together, when an
    adapter changes nothing, when `save` may not be written, and when the proof fails or cannot run.
    """
    save = Path(save)
    _check_options(adapters, options)
    check_save(save, [Path(base), *(Path(folder) for folder, _ in adapters)], overwrite=options.overwrite)
    opened = Base(Path(base))
    parts = [Adapter(Path(folder), weight) for folder, weight in adapters]
    plan = make_plan(opened, parts)
    tokenizer = choose_tokenizer(opened, parts)
    inputs = _inputs(opened, parts, tokenizer, options)
    earlier = _up_to_date(save, inputs, options)
    if earlier is not None:
        report(f"{save} is up to date: it was merged from exactly these files")
        return earlier
    with atomic_folder(save) as folder:
        result, failure = _make(opened, parts, plan, tokenizer, folder, options, inputs)
        write_json(folder / REPORT, result)
        if failure is not None:
            rejected = save.with_name(f"{save.name}.rejected")
            shutil.rmtree(rejected, ignore_errors=True)
            os.rename(folder, rejected)
            raise UserError(f"{failure}; what was written is kept in {rejected}, {save} is as it was")
    for line in _summary(save, result):
        report(line)
    return result


def check_save(save: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """UserError when writing `save` would touch the folder of the base or an adapter, a file, or a folder that no merge made."""
    place = save.resolve()
    for folder in inputs:
        read = folder.resolve()
        if place == read or read in place.parents or place in read.parents:
            raise UserError(f"--save {save} and {folder}, which is read, lie one in the other: give a folder beside it")
    if save.exists() and not save.is_dir():
        raise UserError(f"--save {save} is a file: give the name of a folder")
    if save.is_dir() and any(save.iterdir()) and not (save / REPORT).exists() and not overwrite:
        raise UserError(f"{save} is not empty and not an earlier merge: choose another folder, or replace all of it with --overwrite")


def _check_options(adapters: Sequence[tuple[Path | str, float]], options: MergeOptions) -> None:
    if not adapters:
        raise UserError("no adapter was given: name at least one with --adapter")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype} is not known; choose one of {', '.join(DTYPES)}")
    for folder, weight in adapters:
        if weight == 0.0 or weight != weight or abs(weight) == float("inf"):
            raise UserError(f"the weight of {folder} is {weight}: it must be a number other than 0")


def _inputs(base: Base, adapters: Sequence[Adapter], tokenizer: TokenizerSource, options: MergeOptions) -> dict[str, Any]:
    """What the merge is made of, by content: the same inputs give the same bytes."""
    names = [CONFIG, *base.tensors.files]
    others = [path for path in copied_files(base, tokenizer) if path.name not in names]
    sizes = sum((base.folder / name).stat().st_size for name in names)
    with Progress("reading the base", sizes, unit="B") as progress:
        seals = {}
        for name in names:
            seals[name] = asdict(seal_file(base.folder / name))
            progress.advance(seals[name]["size"])
    return {
        "base": {"folder": options.base_label or base.folder.resolve().name, "files": seals},
        "adapters": [
            {
                "folder": adapter.folder.resolve().name,
                "weight": adapter.weight,
                "trained_on": adapter.base_name,
                "files": {path.name: asdict(seal_file(path)) for path in adapter.files},
            }
            for adapter in adapters
        ],
        "other_files": {f"{path.parent.resolve().name}/{path.name}": asdict(seal_file(path)) for path in others},
        "dtype": options.dtype,
        "max_shard_bytes": options.max_shard_bytes,
        "versions": {
            "megatron_llm": __version__,
            "torch": torch.__version__,
        },
    }


def _up_to_date(save: Path, inputs: dict[str, Any], options: MergeOptions) -> dict[str, Any] | None:
    """The report of an earlier merge of these inputs whose files are all as they were written, None otherwise."""
    if not (save / REPORT).is_file():
        return None
    earlier = read_json(save / REPORT)
    if earlier.get("inputs") != _digest(inputs) or (options.verify and earlier.get("verified") is not True):
        return None
    files = earlier.get("files")
    if not isinstance(files, dict) or {path.name for path in save.iterdir() if path.is_file()} != {REPORT, *files}:
        return None
    return earlier if all(asdict(seal_file(save / name)) == seal for name, seal in files.items()) else None


def _digest(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _make(
    base: Base,
    adapters: Sequence[Adapter],
    plan: Plan,
    tokenizer: TokenizerSource,
    folder: Path,
    options: MergeOptions,
    inputs: dict[str, Any],
) -> tuple[dict[str, Any], str | None]:
    """Fill the folder and judge it: the report, and why the folder must be rejected (None when it must not)."""
    dtype = dtype_from_name(options.dtype) if options.dtype is not None else None
    tied = tied_after(base, plan)
    rows = plan.vocab_size[1] if plan.vocab_size is not None else None
    write_documents(base, tokenizer, folder, vocab_size=rows, tied=tied, dtype=options.dtype)
    specs = output_specs(base, plan, dtype, tied=tied)
    with Progress("merging", sum(spec.size for spec in specs), unit="B") as progress:
        written = write_weights(base, plan, folder, specs, options.max_shard_bytes, progress)
    failure = _fault(adapters, written)
    comparison: MergeComparison | None = None
    if failure is None and options.verify:
        comparison, failure = _prove(base, adapters, folder, written, rows)
    small = {path.name: asdict(seal_file(path)) for path in sorted(folder.iterdir()) if path.is_file() and path.name not in written.seals}
    result = {
        "base": inputs["base"],
        "adapters": [
            {**given, "norm": _norm(written, number), "modules": sum(change.by(number) > 0.0 for change in written.changes.values())}
            for number, given in enumerate(inputs["adapters"])
        ],
        "notes": [*plan.notes, *_notes(inputs["base"]["folder"], adapters, comparison)],
        "vocab_size": None if plan.vocab_size is None else {"base": plan.vocab_size[0], "merged": plan.vocab_size[1]},
        "tied": tied,
        "dtype": "/".join(sorted({dtype_name(spec.dtype) for spec in specs})),
        "changed": change_table(plan, written),
        "unchanged": written.unchanged,
        "verified": comparison is not None and comparison.passed,
        "comparison": None if comparison is None else asdict(comparison),
        "failure": failure,
        "inputs": _digest(inputs),
        "files": {name: asdict(seal) for name, seal in written.seals.items()} | small,
        "versions": {**inputs["versions"], **_library_versions(options.verify)},
    }
    return result, failure


def _norm(written: WrittenWeights, adapter: int) -> float:
    return float(sum(change.by(adapter) ** 2 for change in written.changes.values()) ** 0.5)


def _fault(adapters: Sequence[Adapter], written: WrittenWeights) -> str | None:
    """What the numbers alone say against the merge."""
    broken = [name for name, change in written.changes.items() if not change.finite]
    if broken:
        return f"the merged {broken[0]} is not finite: an adapter is broken, or the type too narrow (then --dtype bfloat16 or float32)"
    for number, adapter in enumerate(adapters):
        if _norm(written, number) == 0.0:
            return f"merged equals base: {adapter.folder} changes no weight, its factors are zero; was it saved before it was trained?"
    if not any(change.elements or change.added for change in written.changes.values()):
        return "merged equals base: what the adapters change is lost when the weights are rounded to their type; merge with --dtype float32"
    return None


def _prove(
    base: Base, adapters: Sequence[Adapter], folder: Path, written: WrittenWeights, rows: int | None
) -> tuple[MergeComparison | None, str | None]:
    dtypes = {spec.name: spec.dtype for spec in written.specs}
    try:
        comparison = compare_merged(base, adapters, folder, dtypes, rows)
    except UserError as error:
        return None, f"{error}; --no-verify leaves the comparison out"
    if comparison.passed:
        return comparison, None
    if comparison.effect == 0.0:
        return comparison, "the adapters change no logit of the base: merged equals base"
    return comparison, (
        "the merged model does not compute what base and adapters do: largest logit difference "
        f"{comparison.largest_difference:.3g} (tolerance {comparison.tolerance:.3g})"
    )


def _notes(base: str, adapters: Sequence[Adapter], comparison: MergeComparison | None) -> list[str]:
    """What is worth knowing and wrong in itself only perhaps."""
    notes = [
        f"{adapter.folder.name} says that it was trained on {Path(adapter.base_name).name}, the base is {base}"
        for adapter in adapters
        if adapter.base_name and Path(adapter.base_name).name != base
    ]
    if comparison is not None and comparison.effect is not None and comparison.rounding > 0.5 * comparison.effect:
        notes.append(
            f"rounding the merged weights moves a logit by up to {comparison.rounding:.3g}, the adapters by {comparison.effect:.3g}: "
            "a merge in float32, or serving base and adapter, keeps more of the training"
        )
    return notes


def _library_versions(verify: bool) -> dict[str, str]:
    return {name: version(name) for name in ("transformers", "peft")} if verify else {}


def _summary(save: Path, result: dict[str, Any]) -> list[str]:
    lines = [f"note: {note}" for note in result["notes"]]
    for adapter in result["adapters"]:
        times = "" if adapter["weight"] == 1.0 else f" x {adapter['weight']:g}"
        lines.append(f"{adapter['folder']}{times}: changed {adapter['modules']} weights, norm of the change {adapter['norm']:.4g}")
    size = sum(seal["size"] for seal in result["files"].values())
    sizes = result["vocab_size"]
    vocabulary = (
        ""
        if sizes is None
        else f", vocabulary {sizes['merged']}" + ("" if sizes["base"] == sizes["merged"] else f" (base {sizes['base']})")
    )
    counts = f"{len(result['changed'])} changed and {result['unchanged']} unchanged weights"
    text = f"wrote {counts}, {size / 1e6:.1f} MB, {result['dtype']}{vocabulary} to {save}"
    comparison = result["comparison"]
    proof = (
        "not verified"
        if comparison is None
        else f"verified: largest logit difference {comparison['largest_difference']:.3g} (tolerance {comparison['tolerance']:.3g}), "
        f"{comparison['way']}"
    )
    return [*lines, f"{text}; {proof}"]
