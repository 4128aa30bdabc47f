"""Files of at most 400 lines, functions of at most 60: what does not fit on a page is split where its parts have names."""

from tests.rules.sources import EVERYTHING, Source, report, sources

FILE_LINES = 400
FUNCTION_LINES = 60


def too_long(source: Source) -> list[str]:
    """The file and the functions in it that are too long."""
    findings = []
    lines = len(source.text.splitlines())
    if lines > FILE_LINES:
        findings.append(f"{source.path}: {lines} lines, at most {FILE_LINES}")
    for function in source.functions():
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > FUNCTION_LINES:
            findings.append(source.at(function, f"{lines} lines, at most {FUNCTION_LINES}"))
    return findings


def test_sizes() -> None:
    findings = [finding for source in sources(*EVERYTHING) for finding in too_long(source)]
    assert not findings, report(findings)


def test_the_rule_sees_a_long_function() -> None:
    text = "def f() -> None:\n" + "    print()\n" * 59
    assert too_long(Source.of("x.py", text)) == []
    assert len(too_long(Source.of("x.py", text + "    print()\n"))) == 1


def test_the_rule_sees_a_long_file() -> None:
    assert too_long(Source.of("x.py", "a = 1\n" * 400)) == []
    assert len(too_long(Source.of("x.py", "a = 1\n" * 401))) == 1
