"""A model of transformers, loaded for answering: its forward pass with a cache, its tokenizer, and how its answers end."""

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_llm.convert.model_folders import Folders
from megatron_llm.lora.loaded import choose_device, context_length, load_with_adapters
from megatron_llm.serve.llama_pass import llama_pass
from megatron_llm.serve.options import ModelOptions
from megatron_llm.serve.refusals import invalid
from megatron_llm.serve.threads import best_threads
from megatron_llm.utils.errors import UserError
from megatron_llm.utils.optional import require

log = logging.getLogger(__name__)
_PROBE = "The answer ends here"  # an answer to find out what a template puts behind answers
_KNOWN_LAYERS = {"full_attention", "sliding_attention", "attention", "chunked_attention"}


class LanguageModel:
    """Weights, tokenizer and template of one served model. `context` is its longest sequence, None when it tells none."""

    def __init__(self, name: str, model: Any, tokenizer: Any, created: int = 0) -> None:
        self.name, self.created = name, created
        self._model, self._tokenizer = model, tokenizer
        self._lock = threading.Lock()  # fast tokenizers refuse to be used by two threads at once
        self._plain_decode = _plain_decode(tokenizer)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = base.config.get_text_config()
        self.device: torch.device = next(base.parameters()).device
        self.dtype: torch.dtype = base.dtype
        accepted = inspect.signature(base.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_last_only = "logits_to_keep" in accepted
        self.vocabulary: int = base.get_output_embeddings().weight.shape[0] if base.get_output_embeddings() else self.config.vocab_size
        self.context = context_length(self.config)
        self.stop_ids = frozenset(self._ends(base))
        self._refuse_unknown_layers()
        self._fast_pass = llama_pass(model)
        self.threads: int | None = None  # with which steps are computed; None: as torch does it

    def _refuse_unknown_layers(self) -> None:
        unknown = set(getattr(self.config, "layer_types", None) or ()) - _KNOWN_LAYERS
        shares = bool(getattr(self.config, "num_kv_shared_layers", 0))
        if unknown or shares:
            what = ", ".join(sorted(unknown)) or "layers that share keys and values"
            raise UserError(f"{self.name} has {what}, which the embedded engine cannot batch: serve it with vLLM (--engine vllm)")

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: Any, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, vocabulary], fp32 on the CPU, behind the last column of ids [rows, new].

        Their keys and values are appended to `cache`.
        `mask` [rows, columns of the cache and new ones] is 0 at padding; `positions` [rows, new] start at 0 in each row.
        """
        if self._fast_pass is not None:
            return self._fast_pass(ids, cache, mask, positions).float()
        extra: dict[str, Any] = {}
        if self._takes_positions:
            extra["position_ids"] = positions
        if self._takes_last_only:
            extra["logits_to_keep"] = 1
        logits: Tensor = self._model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra).logits
        return logits[:, -1].to("cpu", torch.float32)

    def choose_threads(self, rows: int) -> None:
        """Find out with how many threads a step of so many rows is computed best."""
        if self.device.type == "cpu":
            ids, mask = torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1, dtype=torch.long)
            self.threads = best_threads(lambda: self.forward(ids, self.new_cache(), mask, ids))

    def new_cache(self) -> Any:
        """An empty cache. It keeps all positions of windowed layers too, whose window the mask then applies."""
        from transformers import DynamicCache

        return DynamicCache()

    @property
    def has_template(self) -> bool:
        """Whether it can chat: its tokenizer carries a chat template."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    @property
    def tokenizing(self) -> bool:
        """Whether the tokenizer is in use by some thread now, which may take a while when its text is long."""
        return self._lock.locked()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with begin-of-text where the tokenizer adds it and `special` is true. Refusal for text that is no Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise invalid("the text holds half of a surrogate pair: send valid Unicode") from error
        with self._lock:
            ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without the special tokens."""
        with self._lock:
            if self._plain_decode is not None:
                return self._plain_decode(list(ids), skip_special_tokens=True)
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_text(self, token: int) -> str:
        """How one token reads on its own, special ones too."""
        with self._lock:
            text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    def render_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a dialogue up to where the answer begins. Refusal without a template, or when it refuses the messages."""
        if not self.has_template:
            raise invalid(
                f"{self.name} has no chat template: use /v1/completions, or start the server with --chat-template FILE",
                code="no_chat_template",
            )
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise invalid(f"the chat template of {self.name} refuses these messages: {error}", "messages") from error
        return self.encode(text, special=False)

    def _ends(self, model: Any) -> set[int]:
        """Tokens that end an answer: those of the generation settings, the tokenizer's, and what the template puts behind answers."""
        found: set[int] = set()
        for value in (getattr(model.generation_config, "eos_token_id", None), self.config.eos_token_id, self._tokenizer.eos_token_id):
            found.update(token for token in (value if isinstance(value, list | tuple) else [value]) if token is not None)
        if self.has_template:
            dialogue = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": _PROBE}]
            try:
                behind = self._tokenizer.apply_chat_template(dialogue, tokenize=False).rpartition(_PROBE)[2]
            except Exception:
                log.exception("the chat template of %s does not render a question and an answer", self.name)
                raise UserError(f"the chat template of {self.name} cannot render a question and an answer: repair it") from None
            first = self.encode(behind.lstrip(), special=False)[:1]
            found |= set(first) & set(self._tokenizer.all_special_ids) - {self._tokenizer.bos_token_id}
        return {token for token in found if 0 <= token < self.vocabulary}


def _plain_decode(tokenizer: Any) -> Callable[..., str] | None:
    """What a fast tokenizer decodes with in the end, without the layers around it, which take longer; None where they may matter."""
    from transformers import PreTrainedTokenizerFast

    own: Any = type(tokenizer)
    fast: Any = PreTrainedTokenizerFast
    plain = issubclass(own, fast) and own.decode is fast.decode and own._decode is fast._decode
    found: Callable[..., str] | None = tokenizer.backend_tokenizer.decode if plain else None
    return found


def load_language_model(options: ModelOptions, folders: Folders, report: Callable[[str], None], created: int = 0) -> LanguageModel:
    """Load weights, adapters and tokenizer. UserError for what cannot be loaded: no device, wrong adapter, broken files."""
    device = choose_device(options.device)
    settings: dict[str, Any] = {"dtype": "auto" if options.dtype == "auto" else getattr(torch, options.dtype)}
    if options.quantize != "none":
        settings |= {"quantization_config": _quantization(options), "device_map": {"": device}}
    plain = options.quantize == "none"
    model, tokenizer = load_with_adapters(
        folders.weights, folders.tokenizer, folders.adapters, settings=settings, merge=plain, chat_template=options.chat_template
    )
    if plain:
        model = model.to(device)
    model.eval().requires_grad_(False)
    served = LanguageModel(options.served_name, model, tokenizer, created)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    template = "" if served.has_template else "; no chat template, so only /v1/completions"
    report(f"loaded {served.name}: {size / 1e6:.1f} MB on {device}, {str(served.dtype).removeprefix('torch.')}{template}")
    return served


def _quantization(options: ModelOptions) -> Any:
    require("bitsandbytes", extra="quant", purpose=f"--quantize {options.quantize}")
    from transformers import BitsAndBytesConfig

    if options.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
