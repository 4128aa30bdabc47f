"""Pretraining from flags to the last checkpoint: what `tools/pretrain.py` runs on every rank.

Read top to bottom: understand the flags, join the other ranks, build, restore, train.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_llm.checkpoint.tensor_file import dtype_name
from megatron_llm.config.flags import make_parser, read_arguments
from megatron_llm.config.resolve import advice, resolve
from megatron_llm.config.schema import RunConfig
from megatron_llm.lora.parallel import resolve_targets
from megatron_llm.models.registry import get_family
from megatron_llm.parallel.comm import all_reduce, barrier
from megatron_llm.parallel.failure import PhaseTracker
from megatron_llm.parallel.groups import ParallelGroups
from megatron_llm.parallel.placement import get_placement
from megatron_llm.training.adopt import adopt_model
from megatron_llm.training.callbacks.base import CallbackList, RunInfo, TrainSummary
from megatron_llm.training.callbacks.registry import build_callbacks
from megatron_llm.training.engine import NativeEngine, model_dtype
from megatron_llm.training.flops import Peak, flops_per_token, local_peak
from megatron_llm.training.inputs import Identity, Inputs, identify, save_tokenizer, with_vocabulary
from megatron_llm.training.preview import fp8_notes, layout_line, lr_points
from megatron_llm.training.session import Launch, choose_device, distributed, require_equal_flags, tune_process
from megatron_llm.training.signals import ExitMonitor, SignalWatcher
from megatron_llm.training.snapshots import Snapshots
from megatron_llm.training.trainer import Trainer
from megatron_llm.utils.errors import UserError

_LONG = 3600.0  # seconds that what happens once, before the first step, may take


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and train. Mistakes that every rank sees alike are told by the first rank of each machine only."""
    launch = Launch.from_environment(os.environ)
    try:
        config, namespace = read_arguments(make_parser(), argv)
        config = adopt_model(config, namespace.given_fields)
        device = choose_device(config.parallel, launch)
        identity = identify(config)
        family = get_family(config.model.model)
        config = resolve(with_vocabulary(config, identity.vocab_size), launch.world_size, family.violations)
    except UserError:
        if launch.local_rank == 0:
            raise
        # The launcher ends all ranks when the first one leaves: that must be the one that says why.
        time.sleep(30)
        raise SystemExit(1) from None
    train(config, identity, launch, device, tune_process(config, launch, device))


def train(config: RunConfig, identity: Identity, launch: Launch, device: torch.device, process: str) -> TrainSummary:
    """Run a resolved configuration on this rank, together with all others; `process` is what `tune_process` said."""
    with SignalWatcher() as signals:
        monitor = ExitMonitor(config.train.exit_duration_in_mins, config.train.exit_interval, signals)
        phase = PhaseTracker()
        with distributed(config.parallel, launch, device, phase) as groups, _tokenizer_folder(identity, groups) as folder:
            say = _speaker(groups)
            require_equal_flags(config, groups)
            phase.enter("opening the dataset", patience=_LONG)
            inputs = Inputs(config, identity, groups, say)
            phase.enter("building the model", patience=_LONG)
            engine = NativeEngine(config, get_family(config.model.model), groups, on_action=phase.enter)
            phase.enter("loading the checkpoint", patience=_LONG)
            snapshots = Snapshots(
                config,
                engine,
                tokenizer=folder,
                tokenizer_fingerprint=identity.fingerprint,
                contract=identity.contract(config, dtype_name(engine.dtype)),
                report=say,
            )
            progress, callback_states = snapshots.restore()
            for note in snapshots.changes(progress, inputs.order):
                say(f"note     {note}")
            barrier(groups.world)
            callbacks = CallbackList(build_callbacks(config, groups.rank))
            callbacks.load_state_dict(callback_states)
            peak = local_peak(device, model_dtype(config))
            progress.data_order = inputs.order
            gated = engine.family.architecture(config.model).gated_mlp
            trainer = Trainer(
                config,
                engine,
                snapshots,
                progress,
                train_batches=inputs.train_batches(progress.consumed_samples),
                validation_batches=inputs.validation_batches(),
                callbacks=callbacks,
                exit_monitor=monitor,
                phase=phase,
                flops_per_token=flops_per_token(config.model, config.train.seq_length, gated_mlp=gated),
                peak_flops=_total_peak(peak, groups),
            )
            return trainer.run(_describe(config, engine, progress.step, process, f"MFU against {peak.source}"))


def _describe(config: RunConfig, engine: NativeEngine, start_step: int, process: str, peak: str) -> RunInfo:
    """What the console's header and the logs say about the run."""
    groups = engine.groups
    backend = dist.get_backend() if dist.is_initialized() else ""
    return RunInfo(
        config=config,
        start_step=start_step,
        train_iters=config.train.train_iters,
        world_size=groups.world.size,
        parameter_count=count_parameters(engine),
        layout=f"{layout_line(config, groups.world.size, groups.device.type, backend)}, {process}",
        lr_points=lr_points(config, start_step),
        notes=(
            *_adapter_notes(config, engine),
            f"kernels: {engine.kernels.describe()}",
            *fp8_notes(config, engine.chunks, groups.device),
            peak,
            *advice(config, groups.world.size),
        ),
    )


def _adapter_notes(config: RunConfig, engine: NativeEngine) -> list[str]:
    """What is trained when it is not everything. Collective over the model."""
    rank = config.lora.lora_rank
    if rank is None:
        return []
    trained = count_parameters(engine, trainable=True)
    targets = ", ".join(resolve_targets(engine.family, config.lora.lora_target_modules))
    return [f"adapters of rank {rank} on {targets}: {trained:,} parameters are trained, the others are frozen"]


def _total_peak(peak: Peak, groups: ParallelGroups) -> float | None:
    """FLOP/s of all ranks together; None when that of any rank is not known."""
    flops = torch.tensor([peak.flops or 0.0, float(peak.flops is None)], dtype=torch.float64, device=groups.device)
    total, unknown = all_reduce(flops, groups.world).tolist()
    return total if not unknown else None


def count_parameters(engine: NativeEngine, *, trainable: bool = False) -> int:
    """True parameters of the whole model, each once: no padding, no replicas, no tied copies. Collective over the model.

    `trainable` leaves out those that are frozen.
    """
    parameters = dict.fromkeys(parameter for chunk in engine.chunks for parameter in chunk.parameters())
    counted = [parameter for parameter in parameters if parameter.requires_grad or not trainable]
    mine = sum(end - start for parameter in counted for start, end in get_placement(parameter).counted())
    return int(all_reduce(torch.tensor(mine, device=engine.groups.device), engine.groups.model).item())


def _speaker(groups: ParallelGroups) -> Callable[[str], None]:
    """Prints on rank 0, is silent elsewhere."""
    return (lambda line: print(line, flush=True)) if groups.rank == 0 else (lambda line: None)


@contextmanager
def _tokenizer_folder(identity: Identity, groups: ParallelGroups) -> Iterator[Path | None]:
    """The tokenizer's files in a temporary folder on rank 0, which copies them into each checkpoint; None elsewhere."""
    if groups.rank != 0 or identity.tokenizer is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="megatron_llm-tokenizer-") as folder:
        yield save_tokenizer(identity.tokenizer, Path(folder))
