"""A fine-tuning run from its configuration to the folder with the result.

Everything that can be refused is refused before the first step: names, sizes, batch, data. The result appears whole or
not at all: `adapter/` for LoRA (a folder of peft), `model/` otherwise, each with the tokenizer and its template.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from megatron_llm.checkpoint.hf_folder import tokenizer_folder
from megatron_llm.config.finetune_schema import FinetuneConfig
from megatron_llm.finetune.arguments import parse_finetune_config
from megatron_llm.finetune.base import find_base, load_model, load_tokenizer
from megatron_llm.finetune.checkpoints import newest, step_of
from megatron_llm.finetune.data.packing import check_packing
from megatron_llm.finetune.dataset import Samples, prepare_samples
from megatron_llm.finetune.method import apply_method
from megatron_llm.finetune.plan import Plan, make_plan
from megatron_llm.finetune.process import ProcessInfo, StopSignals, check_launch, choose_precision, process_info, training_arguments
from megatron_llm.finetune.recorder import Recorder
from megatron_llm.finetune.rules import check
from megatron_llm.finetune.same_run import check_same_run, remember_run
from megatron_llm.finetune.trainer import Hooks, build_trainer
from megatron_llm.finetune.vocabulary import adapt_vocabulary
from megatron_llm.utils.atomic import atomic_folder, make_folder, write_json
from megatron_llm.utils.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune as the command line says."""
    config = parse_finetune_config(argv)
    _quiet()
    finetune(config)


def finetune(config: FinetuneConfig, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Run to the end and return the content of report.json. UserError for bad input, before anything is written for most."""
    check(config)
    assert config.output.save is not None and config.base.model is not None
    process = process_info(config)
    say = report if process.rank == 0 else _silent
    save = Path(config.output.save)
    folder = find_base(config.base.model, say).resolve()
    say(f"base     {folder}")
    resume = _checkpoint_to_resume(config, save, folder, process, say)
    tokenizer, change = load_tokenizer(config, folder)
    if change is not None:
        say(f"template {change.line()}")
    samples = prepare_samples(config, tokenizer)
    for line in samples.lines:
        say(line)
    plan = make_plan(config, len(samples.train), process.world)
    for line in plan.lines():
        say(line)
    precision = choose_precision(config, process)
    arguments = training_arguments(config, plan, precision, save / "checkpoints", evaluates=bool(samples.valid))
    model = load_model(config, folder, process.device, precision)
    new_tokens = adapt_vocabulary(model, tokenizer_folder(folder), tokenizer, say)
    if config.data.packing:
        if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
            raise UserError("packing is proven on the whole model before training, and ZeRO-3 has it in parts: use zero2, or no packing")
        check_packing(model.to(process.device) if config.base.quantize == "none" else model)
    model = apply_method(model, config, new_tokens=new_tokens, report=say)
    parts = Parts(model, tokenizer, change.end_id if change is not None else None, samples, plan, arguments)
    return _train(config, parts, process, resume, say)


@dataclass(frozen=True)
class Parts:
    """What is put together before the first step; `end_id` is the token that ends answers, where there is a template."""

    model: Any
    tokenizer: Any
    end_id: int | None
    samples: Samples
    plan: Plan
    arguments: Any


def _train(config: FinetuneConfig, parts: Parts, process: ProcessInfo, resume: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    assert config.output.save is not None
    model, tokenizer, end_id, samples, plan, arguments = (getattr(parts, item.name) for item in fields(parts))
    save = Path(config.output.save)
    if process.rank == 0:
        remember_run(config, save, arguments.output_dir)
    start = _pissa_start(config, model, save) if process.rank == 0 else None
    recorder = _recorder(config, save, plan, say) if process.rank == 0 else None
    lora = config.method.method == "lora"
    # The embeddings are saved where they are trained, under modules_to_save; peft would add them twice more after a resize.
    options: dict[str, Any] = {"save_embedding_layers": False} if lora else {}
    with StopSignals() as signals:
        hooks = Hooks(recorder, signals.agreed, config.output.keep_last, options)
        trainer = build_trainer(model, arguments, samples, tokenizer, hooks)
        for callback in trainer.callback_handler.callbacks:
            if hasattr(callback, "trainer"):
                callback.trainer = trainer
        check_launch(trainer, config)
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        finally:
            if recorder is not None and recorder.entries:
                recorder.close()
        if signals.received and trainer.state.global_step < plan.steps:
            raise UserError(
                f"stopped at step {trainer.state.global_step} after a checkpoint was saved: the same command goes on from there"
            )
    if not lora and end_id is not None:
        ends = {tokenizer.eos_token_id, end_id} - {None}
        model.generation_config.eos_token_id = sorted(ends)
    if start is not None:
        options["path_initial_model_for_weight_conversion"] = str(start)
    result = save / ("adapter" if lora else "model")
    _save_result(trainer, result, process)
    if start is not None:
        shutil.rmtree(start)
    content = _report(config, plan, samples, trainer, recorder, result)
    if process.rank == 0:
        write_json(save / "report.json", content)
        say(f"saved    {result}, report {save / 'report.json'}")
    return content


def _checkpoint_to_resume(
    config: FinetuneConfig, save: Path, folder: Path, process: ProcessInfo, say: Callable[[str], None]
) -> Path | None:
    if save.resolve() == folder:
        raise UserError(f"--save {save} is the folder of the base: choose another, the base stays as it is")
    root = save / "checkpoints"
    if not config.output.resume:
        if process.rank == 0 and root.is_dir():
            shutil.rmtree(root)
        return None
    found = newest(root, say) if root.is_dir() else None
    if found is not None:
        check_same_run(config, save)
        say(f"resume   from {found}, step {step_of(found)}")
    return found


def _pissa_start(config: FinetuneConfig, model: Any, save: Path) -> Path | None:
    """PiSSA changes the base when it begins; the adapter it began with turns the result into a plain LoRA of the whole base."""
    if not config.method.use_pissa or config.method.method != "lora":
        return None
    start = make_folder(save) / "pissa_start"
    settings = model.peft_config["default"]
    settings.init_lora_weights = True
    model.save_pretrained(str(start))
    settings.init_lora_weights = "pissa"
    return start


def _recorder(config: FinetuneConfig, save: Path, plan: Plan, say: Callable[[str], None]) -> Recorder:
    output = config.output
    pictures = make_folder(output.img_log_dir or save / "curves")
    title = f"{config.method.method}, {plan.global_batch} sequences a step, {plan.samples} samples"
    return Recorder(
        save / "log.jsonl",
        pictures / "finetune.png",
        title=title,
        steps=plan.steps,
        every=output.log_interval,
        tensorboard=output.tensorboard_dir,
        say=say,
    )


def _save_result(trainer: Any, result: Path, process: ProcessInfo) -> None:
    place: AbstractContextManager[Any] = atomic_folder(result) if process.rank == 0 else nullcontext()
    with place:
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(result.with_name(result.name + ".tmp")))
        trainer.accelerator.wait_for_everyone()


def _report(config: FinetuneConfig, plan: Plan, samples: Samples, trainer: Any, recorder: Recorder | None, result: Path) -> dict[str, Any]:
    entries = recorder.entries if recorder is not None else []
    losses = [entry["loss"] for entry in entries if entry["event"] == "step"]
    evaluations = [[entry["step"], entry["loss"]] for entry in entries if entry["event"] == "evaluation"]
    return {
        "result": os.path.abspath(result),
        "base": config.base.model,
        "data": samples.counts,
        "batch": {"micro": plan.micro_batch, "processes": plan.world, "accumulation": plan.accumulation, "global": plan.global_batch},
        "steps": trainer.state.global_step,
        "lr": [[step, rate] for step, rate in plan.lr_points()],
        "loss": {"first": losses[0] if losses else None, "last": losses[-1] if losses else None},
        "validation_loss": evaluations,
        "torch": torch.__version__,
        "config": asdict(config),
    }


def _quiet() -> None:
    """What concerns the user is said by this package; the libraries' notes on their own affairs would bury it."""
    import logging as python_logging
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _silent(line: str) -> None:
    """Other processes than the first."""
