"""Loss scaling: what keeps small fp16 gradients from vanishing.

The loss is multiplied by a scale before the backward and the gradients are divided by it before the update. The dynamic
scale grows while steps succeed and shrinks when a gradient overflows; the overflowing step is skipped
(Micikevicius et al. 2018, "Mixed Precision Training"). bf16 and fp32 have the range of fp32 and need none of this.

Scalers are pure bookkeeping: whether a step overflowed is decided, for all ranks alike, by the optimizer.
"""

from typing import Any, Protocol

from megatron_llm.config.schema import OptimizerConfig


class LossScaler(Protocol):
    """What the optimizer asks of a scaler."""

    @property
    def scale(self) -> float:
        """What the loss is multiplied by now."""

    @property
    def skips(self) -> bool:
        """Whether a step with a non-finite gradient is skipped, rather than fatal."""

    @property
    def exhausted(self) -> bool:
        """Whether one more overflow would take the scale below its minimum."""

    def update(self, overflow: bool) -> None:
        """Take note of a step's outcome."""

    def state_dict(self) -> dict[str, Any]:
        """Plain scalars."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved scalars; those of another kind of scaler are not taken over."""


class StaticLossScaler:
    """A scale that never changes. 1 is no scaling at all: then a non-finite gradient is not an expected overflow."""

    def __init__(self, scale: float = 1.0, *, skips: bool = False) -> None:
        self.scale = scale
        self.skips = skips
        self.exhausted = False

    def update(self, overflow: bool) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """Only its kind: the scale itself comes from the configuration."""
        return {"kind": "static"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class DynamicLossScaler:
    """Doubles after `loss_scale_window` good steps in a row, halves when overflows persist.

    `hysteresis` overflows are needed for the first halving, and then every further one halves again; the allowance is
    renewed when the scale grows. So a single unlucky batch costs one step and not half the scale.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.scale = config.initial_loss_scale
        self.skips = True
        self._minimum = config.min_loss_scale
        self._window = config.loss_scale_window
        self._hysteresis = config.hysteresis
        self._good_steps = 0
        self._overflows_left = config.hysteresis

    @property
    def exhausted(self) -> bool:
        """Whether one more overflow would take the scale below its minimum."""
        return self._overflows_left <= 1 and self.scale / 2 < self._minimum

    def update(self, overflow: bool) -> None:
        """Take note of a step's outcome."""
        if overflow:
            self._good_steps = 0
            self._overflows_left -= 1
            if self._overflows_left <= 0:
                self.scale = max(self.scale / 2, self._minimum)
            return
        self._good_steps += 1
        if self._good_steps == self._window:
            self._good_steps = 0
            self._overflows_left = self._hysteresis
            self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        """Plain scalars."""
        return {"kind": "dynamic", "scale": self.scale, "good_steps": self._good_steps, "overflows_left": self._overflows_left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved scalars; after a run in another precision the scale starts fresh."""
        if state.get("kind") == "dynamic":
            self.scale = float(state["scale"])
            self._good_steps = int(state["good_steps"])
            self._overflows_left = int(state["overflows_left"])


def make_loss_scaler(config: OptimizerConfig, *, fp16: bool) -> LossScaler:
    """The scaler a run needs: none unless parameters are fp16, then static if `loss_scale` is given, else dynamic."""
    if not fp16:
        return StaticLossScaler()
    if config.loss_scale is not None:
        return StaticLossScaler(config.loss_scale, skips=True)
    return DynamicLossScaler(config)
