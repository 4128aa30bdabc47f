"""The one place where optional dependencies are imported, so that a missing one always says what to install."""

import importlib
import importlib.util
from types import ModuleType

from megatron_llm.utils.errors import UserError


def available(module: str) -> bool:
    """Whether `module` (dotted name) is installed; nothing but its parent packages is imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def require(module: str, *, extra: str | None = None, purpose: str | None = None) -> ModuleType:
    """Import `module`, or raise a UserError that says what needs it and how to install it.

    `extra` is the optional group of this project's package that holds it; without one the module's own package is
    named. `purpose` says what needs it, as the subject of "needs": `--wandb-project`, `reading .zst files`.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        what = f"'megatron_llm[{extra}]'" if extra else package
        needs = f"{purpose} needs {package}" if purpose else f"{package} is needed"
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package
        reason = "which is not installed" if missing else f"which is installed but cannot be imported ({error})"
        raise UserError(f"{needs}, {reason}: pip install {what}") from error
