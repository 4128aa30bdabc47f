"""Write docs/config.md from the configuration schema; with --check, fail when the file is stale."""

from pathlib import Path

from megatron_llm.config.docs import render
from megatron_llm.utils.atomic import write_text
from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import UserError, run_command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"


def main() -> None:
    """Parse the flags and write or check the page."""
    parser = tool_parser(__doc__, "python tools/make_config_docs.py --check")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page differs from the schema")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write (default: docs/config.md of this checkout)")
    options = parser.parse_args()
    page = render()
    if not options.check:
        write_text(options.output, page)
    elif not options.output.is_file() or options.output.read_text(encoding="utf-8") != page:
        raise UserError(f"{options.output} does not agree with the configuration schema: run python tools/make_config_docs.py")


if __name__ == "__main__":
    run_command(main)
