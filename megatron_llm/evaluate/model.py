"""A model of transformers opened for evaluation: log-probabilities of given tokens, and continuations, in batches.

Rows of a batch are padded on the right for scoring, where a causal model never looks at the padding, so positions are
those of the row alone; for generation on the left, with the positions that `generate` derives from the mask. Results do
not depend on the batch beyond rounding.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_llm.convert.model_folders import as_hf_folder
from megatron_llm.evaluate.folders import Parts
from megatron_llm.lora.loaded import choose_device, context_length, load_with_adapters
from megatron_llm.utils.errors import UserError

log = logging.getLogger(__name__)
_LONGEST = 2048  # window of models that name no context, or a longer one
_PROBE = "The answer ends here"  # an answer to find out what a template puts behind answers


class EvaluatedModel:
    """Weights and tokenizer. `context` is the longest sequence (None: the model tells none), `vocabulary` the rows of its output."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.device: torch.device = next(model.parameters()).device
        config = model.config.get_text_config()
        self.context = context_length(config)
        head = model.get_output_embeddings()
        self.vocabulary: int = head.weight.shape[0] if head is not None else config.vocab_size
        self._takes_some = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def window(self) -> int:
        """Tokens that a pass takes when nothing else is said."""
        return min(self.context or _LONGEST, _LONGEST)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with a begin token where the tokenizer adds one and `special` is true; never with an end token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        if special and ids and ids[-1] == end and self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][-1:] != [end]:
            ids = ids[:-1]
        return ids

    def document_prefix(self) -> int | None:
        """The token behind which a document starts: begin, or else end (which separates documents); None without both."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return begin if begin is not None else end

    def render_chat(self, text: str) -> str:
        """One question through the chat template, up to where the answer begins. UserError without a template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError("the model has no chat template: set chat: false, or give the model a chat_template: FILE")
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": text}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"the chat template refuses a single question: {error}") from error

    @torch.inference_mode()
    def log_probs(self, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Log-probabilities of the ids [starts[i]:] of row i, each given all before it: `(i, fp64 [len - start])`, longest rows first.

        A start is at least 1: nothing comes before the first id.
        """
        for members in self._batches([len(row) for row in rows]):
            logits, kept = self._logits([rows[i] for i in members], min(starts[i] for i in members) - 1)
            for place, i in enumerate(members):
                start = starts[i]
                if start < 1:
                    raise ValueError(f"row {i} is scored from id {start}: at least 1 is needed")
                wanted = torch.tensor(rows[i][start:], device=self.device)
                chosen = logits[place, start - 1 - kept : len(rows[i]) - 1 - kept]
                scores = torch.log_softmax(chosen.float(), dim=-1).gather(1, wanted[:, None])[:, 0]
                yield i, scores.double().cpu()

    @torch.inference_mode()
    def next_log_probs(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
        """Log-probabilities of all tokens behind row i: `(i, fp32 [vocabulary])`, longest rows first."""
        for members in self._batches([len(row) for row in rows]):
            batch = [rows[i] for i in members]
            logits, kept = self._logits(batch, min(map(len, batch)) - 1)
            for place, i in enumerate(members):
                yield i, torch.log_softmax(logits[place, len(rows[i]) - 1 - kept].float(), dim=-1).cpu()

    def _logits(self, rows: Sequence[Sequence[int]], first: int) -> tuple[Tensor, int]:
        """Logits [B, S - kept, V] of rows padded on the right, from column `kept` on, which is `first` where the model can do that."""
        width = max(map(len, rows))
        if self.context is not None and width > self.context:
            raise ValueError(f"a row of {width} ids for a model with a context of {self.context}")
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        kept = first if self._takes_some else 0
        extra = {"logits_to_keep": width - kept} if self._takes_some else {}
        output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False, **extra)
        return output.logits, kept

    @torch.inference_mode()
    def generate(
        self, rows: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, top_p: float, seed: int, ends: frozenset[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """Continuations of rows: `(i, ids)`, without the token that ended it, longest rows first.

        With a temperature, row i draws from a generator of its own seed, whatever its batch.
        """
        from transformers import GenerationConfig

        batches = self._batches([len(row) for row in rows]) if temperature == 0 else ([i] for i in range(len(rows)))
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "num_beams": 1}
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        config = GenerationConfig(**settings, eos_token_id=sorted(ends) or None, pad_token_id=padding, use_cache=True)
        for members in batches:
            width = max(len(rows[i]) for i in members)
            ids = torch.full((len(members), width), padding, dtype=torch.long)
            mask = torch.zeros(len(members), width, dtype=torch.long)
            for place, i in enumerate(members):
                ids[place, width - len(rows[i]) :] = torch.tensor(rows[i])
                mask[place, width - len(rows[i]) :] = 1
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed + members[0])
                output = self.model.generate(ids.to(self.device), attention_mask=mask.to(self.device), generation_config=config)
            for place, i in enumerate(members):
                new = output[place, width:].tolist()
                stop = next((n for n, token in enumerate(new) if token in ends), len(new))
                yield i, new[:stop]

    def ends(self, chat: bool) -> frozenset[int]:
        """Tokens that end a continuation: the model's and tokenizer's end tokens, and with `chat` what the template puts behind answers."""
        found: set[int] = set()
        configured = getattr(self.model, "evaluated_ends", None) or self.model.config.get_text_config().eos_token_id
        for value in (configured, self.tokenizer.eos_token_id):
            found.update(token for token in (value if isinstance(value, list | tuple) else [value]) if token is not None)
        if chat:
            turn = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": _PROBE}]
            behind = str(self.tokenizer.apply_chat_template(turn, tokenize=False)).rpartition(_PROBE)[2].strip()
            found |= set(self.encode(behind, special=False)[:1]) & set(self.tokenizer.all_special_ids)
        return frozenset(token for token in found if 0 <= token < self.vocabulary)

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Numbers of rows in batches of like length, longest first, so that memory runs out at once or never."""
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]


@contextmanager
def opened(parts: Parts, *, device: str, dtype: str, batch_size: int, report: Callable[[str], None]) -> Iterator[EvaluatedModel]:
    """The model, loaded with its adapters, given free at the end. UserError for what cannot be loaded."""
    place = choose_device(device)
    if dtype == "auto" and place == "cpu":
        dtype = "float32"
    with as_hf_folder(parts.weights, report) as folder:
        model, tokenizer = _load(parts, folder, dtype)
        try:
            yield EvaluatedModel(model.to(place).eval().requires_grad_(False), tokenizer, batch_size)
        finally:
            del model
            if place.startswith("cuda"):
                torch.cuda.empty_cache()


def _load(parts: Parts, folder: Path, dtype: str) -> tuple[Any, Any]:
    from transformers import GenerationConfig

    settings = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    model, tokenizer = load_with_adapters(folder, parts.tokenizer, parts.adapters, settings=settings, chat_template=parts.chat_template)
    # Settings for sampling that a folder brings would make models incomparable; only its end tokens are kept.
    model.evaluated_ends = getattr(model.generation_config, "eos_token_id", None)
    model.generation_config = GenerationConfig()
    return model, tokenizer
