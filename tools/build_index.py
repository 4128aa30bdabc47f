"""Build the sample index of a training run ahead of time, so that no rank waits for it at the start.

Give the same values as to the training run: the index is found again only when all of them agree. It is written to
--data-cache-path, or to the folder `cache` beside the data. Building twice, or on several machines at once, does no harm.
"""

from megatron_llm.config.schema import DataConfig, TrainConfig
from megatron_llm.utils.command_line import tool_parser
from megatron_llm.utils.errors import UserError, run_command

EXAMPLE = "python tools/build_index.py --data-path demo/data/corpus_text_document --seq-length 128 --train-iters 100 --global-batch-size 32"


def main() -> None:
    """Read the flags, build the train and validation index."""
    data, train = DataConfig(), TrainConfig()
    parser = tool_parser(__doc__, EXAMPLE)
    parser.add_argument("--data-path", nargs="+", required=True, help="prefix of .bin/.idx, or weight prefix weight prefix ...")
    parser.add_argument("--split", default=data.split, help=f"shares of train, validation and test (default {data.split})")
    parser.add_argument("--seq-length", type=int, required=True, help="tokens in one sequence")
    parser.add_argument("--seed", type=int, default=train.seed, help=f"seed of the data order (default {train.seed})")
    parser.add_argument("--data-cache-path", help="folder of the index cache (default: `cache` beside the data)")
    parser.add_argument("--train-iters", type=int, help="steps of the run; with --global-batch-size gives the training samples")
    parser.add_argument("--global-batch-size", type=int, help="sequences in one step")
    parser.add_argument("--eval-iters", type=int, default=train.eval_iters, help=f"batches in one evaluation (default {train.eval_iters})")
    parser.add_argument("--train-samples", type=int, help="training samples, instead of --train-iters and --global-batch-size")
    parser.add_argument("--valid-samples", type=int, default=0, help="validation samples, with --train-samples (default 0: none)")
    args = parser.parse_args()
    steps = args.train_iters is not None and args.global_batch_size is not None
    if args.train_samples is None and not steps:
        raise UserError("give --train-iters and --global-batch-size, or --train-samples")

    from megatron_llm.data.build import SampleCounts, build_datasets, sample_counts  # torch is not needed for --help

    counts = SampleCounts(args.train_samples, args.valid_samples)
    if args.train_samples is None:
        counts = sample_counts(args.train_iters, args.global_batch_size, args.eval_iters)
    config = DataConfig(data_path=args.data_path, split=args.split, data_cache_path=args.data_cache_path)
    build_datasets(config, counts, seq_length=args.seq_length, seed=args.seed)


if __name__ == "__main__":
    run_command(main)
