"""Draw a pipeline schedule as a picture of all stages in time, and print what it costs: ticks, idle time, live activations."""

from pathlib import Path

from megatron_llm.parallel.schedules import ORDERS, make_schedule
from megatron_llm.parallel.simulator import simulate
from megatron_llm.parallel.timeline import draw_timeline
from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import run_command

EXAMPLE = "python tools/plot_schedule.py --schedule interleaved --stages 4 --micro-batches 8 --chunks 2 --output schedule.png"


def main() -> None:
    """Parse, simulate, print, draw."""
    parser = tool_parser(__doc__, EXAMPLE)
    parser.add_argument("--schedule", default="1f1b", choices=sorted(ORDERS), help="which schedule (default 1f1b)")
    parser.add_argument("--stages", type=int, default=4, help="pipeline ranks (default 4)")
    parser.add_argument("--micro-batches", type=int, default=8, help="micro-batches a step (default 8)")
    parser.add_argument("--chunks", type=int, default=1, help="model chunks a rank, more than one for interleaved (default 1)")
    parser.add_argument("--output", type=Path, default=Path("schedule.png"), help="picture to write (default schedule.png)")
    args = parser.parse_args()
    plan = make_schedule(args.schedule, args.stages, args.micro_batches, args.chunks)
    result = simulate(plan, args.micro_batches, args.chunks)
    print(f"{result.ticks:g} ticks (one chunk's forward 1, backward 2), {result.bubble:.1%} of all ranks' time idle")
    print("peak live activations of each stage:", *result.peak_activations)
    chunks = f" of {args.chunks} chunks" if args.chunks > 1 else ""
    draw_timeline(result, f"{args.schedule}, {args.stages} stages{chunks}, {args.micro_batches} micro-batches", args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
