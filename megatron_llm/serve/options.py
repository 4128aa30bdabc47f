"""What a server is started with: the model, where it listens, and its limits. Checked here, before anything is loaded."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_llm.utils.errors import UserError

ENGINES = ("auto", "transformers", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "int4")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how many may ask at once.

    prompt_tokens   longest prompt; None: what the model's context leaves
    new_tokens      longest answer
    body_bytes      largest request body
    body_seconds    time a client has to send its body
    running         answers that are computed at the same time
    waiting         answers that may wait for that, further requests get status 429
    seconds         time for a request, waiting included
    """

    prompt_tokens: int | None = None
    new_tokens: int = 1024
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    running: int = 32
    waiting: int = 64
    seconds: float = 600.0

    def __post_init__(self) -> None:
        """Raise UserError for a limit that would let nothing through."""
        for name in ("prompt_tokens", "new_tokens", "body_bytes", "running", "seconds", "body_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--max-{name.replace('_', '-')} is {value}, but it must be above 0")
        if self.waiting < 0:
            raise UserError(f"--max-waiting is {self.waiting}, but it must be 0 or more")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded.

    model          Hugging Face folder, checkpoint of ours or folder of them, or a PEFT adapter (its base is then looked up)
    adapters       further PEFT adapters, applied to `model` in this order
    name           name it is served under; None: the folder's
    chat_template  Jinja file to use in place of the tokenizer's own
    """

    model: Path
    adapters: tuple[Path, ...] = ()
    name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    chat_template: Path | None = None

    def __post_init__(self) -> None:
        """Raise UserError for an unknown word or a file that is not there."""
        for flag, value, allowed in (("--dtype", self.dtype, DTYPES), ("--quantize", self.quantize, QUANTIZATIONS)):
            if value not in allowed:
                raise UserError(f"{flag} is '{value}', but it must be one of: {', '.join(allowed)}")
        if self.chat_template is not None and not self.chat_template.is_file():
            raise UserError(f"--chat-template names the file '{self.chat_template}', which does not exist")

    @property
    def served_name(self) -> str:
        """The name that requests give as `model`."""
        return self.name or (self.adapters[-1] if self.adapters else self.model).resolve().name


@dataclass(frozen=True)
class Endpoint:
    """Another OpenAI-style server that the chat page offers: a name for people and its URL up to and including `/v1`."""

    name: str
    url: str

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """From `NAME=URL` or `URL`; UserError for anything but http and https."""
        before, equals, after = text.partition("=")
        name, url = (before, after) if equals and "://" not in before else (text, text)
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--endpoint is '{text}', but it must be a URL such as http://127.0.0.1:8001/v1, or NAME=URL")
        return cls(name, url.rstrip("/"))


@dataclass(frozen=True)
class ServeOptions:
    """All of it. `api_key` comes from the environment, never from the command line, where others could read it.

    `origins` are web pages (beside those of this machine) that may talk to the server; "*" is every page.
    `shutdown_seconds` is how long running answers may go on after a SIGTERM.
    """

    source: ModelOptions
    engine: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None
    endpoints: tuple[Endpoint, ...] = ()
    origins: tuple[str, ...] = ()
    shutdown_seconds: float = 20.0

    def __post_init__(self) -> None:
        """Raise UserError for an unknown engine or a port outside 0 to 65535 (0: any free one)."""
        if self.engine not in ENGINES:
            raise UserError(f"--engine is '{self.engine}', but it must be one of: {', '.join(ENGINES)}")
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port is {self.port}, but it must be from 0 (any free port) to 65535")
        if self.api_key is not None and (not self.api_key.isascii() or self.api_key != self.api_key.strip() or not self.api_key):
            raise UserError("API_KEY is empty, or has spaces around it or characters outside ASCII: give a plain word, or unset it")
