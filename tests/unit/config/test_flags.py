"""Flags are the schema, nothing is accepted that has no meaning, and the order of precedence is flag, file, default."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_llm.config.fields import FieldSpec, all_fields, updated
from megatron_llm.config.flags import as_arguments, make_parser, parse_run_config, read_arguments
from megatron_llm.config.megatron_names import MEGATRON_HINTS
from megatron_llm.config.resolve import resolve
from megatron_llm.config.schema import RunConfig
from megatron_llm.utils.errors import UserError

FIELDS = all_fields()


def spellings(spec: FieldSpec) -> list[str]:
    """Every flag that sets a field."""
    negative = ["--no-" + flag[2:] for flag in spec.flags] if spec.kind is bool else []
    return [*spec.flags, *negative, *("--" + spelling for spelling, _ in spec.constants)]


def sample(spec: FieldSpec) -> str:
    """A value other than the default, as text."""
    if spec.choices:
        return spec.choices[-1]
    return {int: "7", float: "0.125", str: "some/where"}[spec.kind]


def test_no_arguments_give_the_defaults() -> None:
    assert parse_run_config([]) == RunConfig()


def test_every_spelling_belongs_to_one_field() -> None:
    flags = [flag for spec in FIELDS for flag in spellings(spec)]
    assert len(flags) == len(set(flags))
    assert not set(flags) & set(MEGATRON_HINTS), "a flag cannot exist and be explained as missing"


@pytest.mark.parametrize("spec", [spec for spec in FIELDS if spec.kind is not bool], ids=lambda spec: spec.name)
def test_every_flag_and_alias_sets_its_field_and_nothing_else(spec: FieldSpec) -> None:
    expected = updated(RunConfig(), **{spec.name: sample(spec)})
    for flag in spec.flags:
        assert parse_run_config([flag, sample(spec)]) == expected
        assert parse_run_config([f"{flag}={sample(spec)}"]) == expected
    assert expected != RunConfig()


@pytest.mark.parametrize("spec", [spec for spec in FIELDS if spec.kind is bool], ids=lambda spec: spec.name)
def test_every_boolean_has_a_flag_for_yes_and_no(spec: FieldSpec) -> None:
    for flag in spec.flags:
        assert parse_run_config([flag]) == updated(RunConfig(), **{spec.name: True})
        assert parse_run_config(["--no-" + flag[2:]]) == updated(RunConfig(), **{spec.name: False})


def test_types_are_those_of_the_schema() -> None:
    config = parse_run_config(["--tp", "2", "--lr", "1e-3", "--ddp-bucket-size", "1e6", "--data-path", "0.3", "a", "0.7", "b", "--bf16"])
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.optimizer.lr == 1e-3
    assert config.parallel.ddp_bucket_size == 1_000_000 and isinstance(config.parallel.ddp_bucket_size, int)
    assert config.data.data_path == ["0.3", "a", "0.7", "b"]
    assert config.train.bf16 is True


def test_megatron_spellings_that_mean_the_same() -> None:
    config = parse_run_config(
        ["--untie-embeddings-and-output-weights", "--recompute-activations", "--layernorm-epsilon", "1e-6", "--no-load-optim"]
    )
    assert config.model.tie_word_embeddings is False
    assert config.train.recompute_granularity == "selective"
    assert config.model.norm_epsilon == 1e-6
    assert config.checkpoint.load_optim is False


@pytest.mark.parametrize("flag", ["--swiglu", "--use-mcore-models", "--train-samples", "--num-layers-per-virtual-pipeline-stage"])
def test_megatron_flags_decided_elsewhere_are_explained(flag: str) -> None:
    with pytest.raises(UserError) as error:
        parse_run_config([flag])
    assert flag in str(error.value) and MEGATRON_HINTS[flag] in str(error.value)


def test_hints_name_flags_that_exist() -> None:
    known = {flag for spec in FIELDS for flag in spellings(spec)} | {"--config"}
    for flag, hint in MEGATRON_HINTS.items():
        for word in hint.replace(",", " ").replace(":", " ").replace("(", " ").split():
            assert not word.startswith("--") or word in known, f"the hint for {flag} names {word}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--num-layer", "3"], "unknown flag --num-layer: did you mean --num-layers?"),
        (["--num_layers", "3"], "unknown flag --num_layers: did you mean --num-layers?"),
        (["--micro-batchsize=3"], "unknown flag --micro-batchsize: did you mean --micro-batch-size?"),
        (["--qqqqqqqqqqqq"], "unknown flag --qqqqqqqqqqqq: --help lists all flags"),
        (["--tensor", "2"], "unknown flag --tensor"),  # an abbreviation
        (["llama"], "unexpected argument 'llama'"),
        (["--tp", "two"], "--tensor-model-parallel-size needs a whole number, got 'two'"),
        (["--tp", "2.5"], "--tensor-model-parallel-size needs a whole number, got '2.5'"),
        (["--lr", "fast"], "--lr needs a number, got 'fast'"),
        (["--num-layers", "none"], "--num-layers needs a whole number, got 'none'"),
        (["--lr-decay-style", "cosin"], "did you mean 'cosine'?"),
        (["--tp"], "--tp: expected one argument"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parse_run_config(arguments)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_all_unknown_flags_are_named_together() -> None:
    with pytest.raises(UserError) as error:
        parse_run_config(["--num-layer", "3", "--hiden-size", "4"])
    assert "--num-layers" in str(error.value) and "--hidden-size" in str(error.value)


def test_the_last_of_a_repeated_flag_counts() -> None:
    assert parse_run_config(["--tp", "2", "--tensor-model-parallel-size", "4"]).parallel.tensor_model_parallel_size == 4
    assert parse_run_config(["--bf16", "--no-bf16"]).train.bf16 is False


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  seq_length: 512\n  bf16: true\nlr: 1e-3\nkeep_every: 5\n")
    config = parse_run_config(["--config", str(path), "--seq-length", "128", "--no-bf16", "--keep-every", "none"])
    assert config.train.seq_length == 128
    assert config.train.bf16 is False
    assert config.optimizer.lr == 1e-3
    assert config.checkpoint.keep_every is None
    assert config.model == RunConfig().model


def test_a_tool_may_add_its_own_flags() -> None:
    parser = make_parser(prog="tool")
    parser.add_argument("--dry-run", action="store_true")
    config, options = read_arguments(parser, ["--dry-run", "--tp", "2"])
    assert config.parallel.tensor_model_parallel_size == 2
    assert vars(options) == {"dry_run": True, "given_fields": {"tensor_model_parallel_size"}}


def test_help_starts_with_the_example_and_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse_run_config(["--help"])
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    assert text.startswith("example:\n")
    for spec in FIELDS:
        for flag in spellings(spec):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), flag
    assert all(spec.help for spec in FIELDS)


def test_the_example_in_the_help_is_a_valid_run(capsys: pytest.CaptureFixture[str]) -> None:
    """As it is printed: every word is understood and survives the rules, and the rules do look at its numbers."""
    with pytest.raises(SystemExit):
        parse_run_config(["--help"])
    line = capsys.readouterr().out.splitlines()[1]
    words = shlex.split(line[line.index("--") :])
    config = resolve(parse_run_config(words), world_size=1)
    named = {spec.flag: spec for spec in FIELDS if spec.flag in words}
    assert list(filter(lambda word: word.startswith("--"), words)) == sorted(named, key=words.index) != []
    for flag, spec in named.items():
        expected = True if spec.kind is bool else spec.read(words[words.index(flag) + 1], flag)
        assert getattr(getattr(config, spec.section), spec.name) == expected
    numbers = [place for place, word in enumerate(words) if word.isdigit()]
    assert len(numbers) >= 4
    for place in numbers:
        with pytest.raises(UserError, match=words[place - 1].removeprefix("--").replace("-", "_")):
            resolve(parse_run_config([*words[:place], "0", *words[place + 1 :]]), world_size=1)


FIELD_VALUES = {
    spec.name: st.booleans()
    if spec.kind is bool
    else st.sampled_from(spec.choices)
    if spec.choices
    else {int: st.integers(0, 10**9), float: st.floats(0, 1e9), str: st.sampled_from(["a", "b/c d", "0.5", "x=y"])}[spec.kind]
    for spec in FIELDS
    if not spec.is_list
}


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(FIELD_VALUES)), st.none(), max_size=8).flatmap(
        lambda names: st.fixed_dictionaries({name: FIELD_VALUES[name] for name in names})
    )
)
def test_as_arguments_is_the_inverse_of_parsing(values: dict[str, object]) -> None:
    config = updated(RunConfig(), **values)
    parsed = parse_run_config(as_arguments(config))
    assert asdict(parsed) == asdict(config)
