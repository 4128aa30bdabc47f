"""Small fine-tuning runs for tests: a random model with a tokenizer, question-answer pairs, and a run with few flags."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_llm.finetune.arguments import parse_finetune_config
from megatron_llm.finetune.run import finetune
from tests.families import CASES, write_folder
from tests.small_tokenizers import TEXTS, byte_level

FAMILIES = {case.family: case for case in reversed(CASES)}
BASIC = ("--device", "cpu", "--max-length", "24", "--micro-batch-size", "2", "--global-batch-size", "4", "--lora-dropout", "0")


def base_folder(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """A Hugging Face folder of a small random model with a byte-level tokenizer that carries a chat template."""
    from megatron_llm.finetune.templates.install import add_template
    from megatron_llm.finetune.templates.install import open_tokenizer as open_hf

    byte_level(folder, size=283).save_pretrained(folder)
    tokenizer = open_hf(folder)
    tokenizer.eos_token = "<|endoftext|>"
    add_template(tokenizer, "qwen")
    tokenizer.save_pretrained(folder)
    case = FAMILIES[family]
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "num_layers": 2}
    config = type(case)(family, tuple({**dict(case.settings), **sizes, **settings}.items())).config()
    write_folder(folder, config)
    return folder


def write_pairs(path: Path, count: int = 24) -> Path:
    """Questions and answers of different lengths, one a line."""
    records = [{"instruction": f"{TEXTS[0][: 3 + n % 5]}", "output": f"{n} {TEXTS[1][: 4 + n % 7]}"} for n in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(model: Path, data: Path, save: Path, *flags: str, said: list[str] | None = None) -> dict[str, Any]:
    """A run with small sizes; the last of two equal flags counts. `said` receives the lines."""
    config = parse_finetune_config(["--model", str(model), "--train-data", str(data), "--save", str(save), *BASIC, *flags])
    return finetune(config, (said if said is not None else []).append)


def step_losses(save: Path) -> list[float]:
    """The training losses in a run's log."""
    return [entry["loss"] for entry in log(save) if entry["event"] == "step"]


def log(save: Path) -> Sequence[dict[str, Any]]:
    """The entries of a run's log."""
    return [json.loads(line) for line in (save / "log.jsonl").read_text().splitlines()]
