"""The embedded engine: one thread that computes all running answers together.

Each round it reads prompts that wait, several together where they are of similar length (never more than `PROMPT_CHUNK` tokens,
so that a long prompt does not stop the others), then appends one token to every running answer in a single forward pass. An
answer leaves the batch when it ends, when its time is up or when its client is gone, and the next one takes its place in the
next round. (Iteration-level scheduling: Yu et al., Orca, OSDI 2022.)
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from megatron_llm.serve.kv_batch import KeyValueBatch
from megatron_llm.serve.language_model import LanguageModel
from megatron_llm.serve.metrics import Metrics
from megatron_llm.serve.options import Limits
from megatron_llm.serve.refusals import Refusal
from megatron_llm.serve.sampling import Choice, Sampler, SamplingOptions, choose
from megatron_llm.serve.text import TextStream
from megatron_llm.serve.threads import using_threads

log = logging.getLogger(__name__)
PROMPT_CHUNK = 512
# While others run, a prompt may wait so long for companions to be read with: a pass over four costs little more than over one.
_COMPANY, _COMPANY_SECONDS = 4, 0.005


class Piece(NamedTuple):
    """What is new of answer `number`: text that became certain (maybe none yet), tokens, and at the end why it ended.

    `choices` are the new tokens without an end token, `tokens` is how many there are with it. `finish` is "stop" (an end token or
    stop string) or "length".
    """

    number: int
    text: str
    choices: tuple[Choice, ...]
    tokens: int
    finish: str | None = None


@dataclass(frozen=True)
class Failed:
    """The request ends without (the rest of) its answer."""

    refusal: Refusal


Deliver = Callable[[Piece | Failed], None]


@dataclass(eq=False)
class Job:
    """One request: several prompts, `n` answers to each. `deliver` is called from the engine's thread."""

    deliver: Deliver
    deadline: float
    created: float
    whole: bool  # each answer is told once, at its end
    open: int = 0  # answers that have not ended
    cancelled: bool = False
    first_token: bool = False


@dataclass(eq=False)
class _Answer:
    number: int
    job: Job
    options: SamplingOptions
    sampler: Sampler
    text: TextStream
    last: int = -1
    count: int = 0
    ended: bool = False
    untold: int = 0  # tokens, choices and text since the last piece
    choices: list[Choice] = field(default_factory=list)
    held: str = ""


@dataclass(eq=False)
class _Prompt:
    ids: list[int]
    job: Job
    answers: list[_Answer]
    started: bool = False  # its answers hold their places
    done: int = 0  # tokens already in the cache
    cache: Any = None  # of a prompt that is read in pieces


class Engine:
    """Takes jobs from any thread. `submit` refuses with 429 when too many wait; `close` ends everything."""

    def __init__(self, model: LanguageModel, limits: Limits, metrics: Metrics) -> None:
        self.model, self.limits, self.metrics = model, limits, metrics
        self._waiting: deque[_Prompt] = deque()
        self._wake = threading.Condition()
        self._closing: Refusal | None = None
        self._batch: KeyValueBatch[_Answer] = KeyValueBatch(model)
        self._active = 0  # answers that hold a place: running, or their prompt is being read
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it computes."""
        return self._closing is None and self._thread.is_alive()

    def submit(self, prompts: Sequence[list[int]], n: int, options: SamplingOptions, deliver: Deliver, *, whole: bool = False) -> Job:
        """Queue the n answers to each prompt; answer number = prompt number * n + its own. Refusal when the queue is full.

        With `whole` each answer comes as one piece at its end, otherwise token by token.
        """
        now = time.monotonic()
        job = Job(deliver, now + self.limits.seconds, now, whole, open=len(prompts) * n)
        numbers = itertools.count()
        queued = []
        for ids in prompts:
            answers = []
            for own in range(n):
                text = TextStream(self.model.decode, ids, options.stop, whole=whole)
                answers.append(_Answer(next(numbers), job, options, Sampler(options, own), text))
            queued.append(_Prompt(ids, job, answers))
        with self._wake:
            if self._closing is not None:
                raise self._closing
            free = max(0, self.limits.running - self._active)
            if self._pending() + job.open > self.limits.waiting + free:
                raise Refusal(
                    429,
                    f"{self._pending()} answers wait already, the limit is {self.limits.waiting}: try again later",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            self._waiting.extend(queued)
            self._gauges()
            self._wake.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody wants the rest of it: its places are free from the next round on."""
        job.cancelled = True
        if job.open:
            with self._wake:
                self._wake.notify()

    def close(self, refusal: Refusal | None = None) -> None:
        """Fail what runs and waits, and end the thread."""
        with self._wake:
            self._closing = refusal or Refusal(503, "the server is shutting down", code="shutting_down")
            self._wake.notify()
        self._thread.join()

    def _pending(self) -> int:
        return sum(len(prompt.answers) for prompt in self._waiting if not prompt.started)

    def _gauges(self) -> None:
        self.metrics.set_queue(self._active, self._pending())

    def _run(self) -> None:
        with using_threads(self.model.threads):
            why = self._compute()
        self._fail_all(why)

    def _compute(self) -> Refusal:
        """Answer until `close`; what those are told who are left."""
        while (closing := self._closing) is None:
            with self._wake:
                while not self._waiting and not self._batch.owners and self._closing is None:
                    self._wake.wait()
            try:
                self._drop_unwanted()
                self._read_prompts()
                self._decode()
            except Exception as error:
                # A failure of the computation ends the answers that it touched, not the server.
                log.exception("computing failed")
                short = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
                self._fail_all(Refusal(500, f"computing the answer failed ({short}); the server's log says more", code="engine_error"))
        return closing

    def _fail_all(self, refusal: Refusal) -> None:
        with self._wake:
            left = [prompt.job for prompt in self._waiting] + [answer.job for answer in self._batch.owners]
            self._waiting.clear()
            self._batch = KeyValueBatch(self.model)
            self._active = 0
            self._gauges()
        for job in dict.fromkeys(left):
            self._fail(job, refusal)

    def _fail(self, job: Job, refusal: Refusal) -> None:
        if not job.cancelled:
            job.cancelled = True
            job.deliver(Failed(refusal))

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        late = Refusal(504, f"the answer was not ready within {self.limits.seconds:g} s", code="timeout")
        with self._wake:
            jobs = dict.fromkeys([prompt.job for prompt in self._waiting] + [answer.job for answer in self._batch.owners])
        for job in jobs:
            if now > job.deadline:
                self._fail(job, late)
        if any(job.cancelled for job in jobs):
            with self._wake:
                for prompt in [prompt for prompt in self._waiting if prompt.job.cancelled]:
                    self._waiting.remove(prompt)
                    self._active -= len(prompt.answers) if prompt.started else 0
                self._gauges()
            self._leave()

    def _leave(self) -> None:
        rows = [row for row, answer in enumerate(self._batch.owners) if answer.ended or answer.job.cancelled]
        if rows:
            self._batch.drop(rows)
            with self._wake:
                self._active -= len(rows)
                self._gauges()

    def _read_prompts(self) -> None:
        """Read prompts in the order of their arrival while there are places for their answers."""
        budget = PROMPT_CHUNK
        if self._batch.owners and self._waits_for_company():
            return
        while budget > 0 and (group := self._next_prompts(budget)):
            budget -= self._read_together(group) if len(group) > 1 else self._read_piece(group[0], budget)

    def _waits_for_company(self) -> bool:
        with self._wake:
            if len(self._waiting) >= _COMPANY or not self._waiting or self._waiting[0].started:
                return False
            return time.monotonic() - self._waiting[0].job.created < _COMPANY_SECONDS

    def _next_prompts(self, budget: int) -> list[_Prompt]:
        """Prompts that are read together: first come, first served, with places for their answers, and not too different in length."""
        group: list[_Prompt] = []
        longest = tokens = 0
        with self._wake:
            for prompt in self._waiting:
                if prompt.started:  # the first of all, which is read in pieces
                    return [prompt]
                longest, tokens = max(longest, len(prompt.ids)), tokens + len(prompt.ids)
                area = longest * (len(group) + 1)
                if self._active + len(prompt.answers) > self.limits.running or (group and area > min(budget, 2 * tokens)):
                    break
                prompt.started = True
                self._active += len(prompt.answers)
                group.append(prompt)
            if group:
                self._gauges()
        return group

    def _read_together(self, group: list[_Prompt]) -> int:
        """Read several prompts in one pass, padded on the left; how many tokens that was."""
        longest = max(len(prompt.ids) for prompt in group)
        pads = [longest - len(prompt.ids) for prompt in group]
        device, cache = self.model.device, self.model.new_cache()
        ids = torch.tensor([[0] * pad + prompt.ids for pad, prompt in zip(pads, group, strict=True)], device=device)
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
        positions = torch.tensor([[0] * pad + list(range(longest - pad)) for pad in pads], device=device)
        self._join(group, cache, self.model.forward(ids, cache, mask, positions))
        return ids.numel()

    def _read_piece(self, prompt: _Prompt, budget: int) -> int:
        """Read a prompt, or as much more of it as `budget` allows; how many tokens that was."""
        prompt.cache = prompt.cache or self.model.new_cache()
        piece = prompt.ids[prompt.done : prompt.done + budget]
        start, prompt.done = prompt.done, prompt.done + len(piece)
        ids = torch.tensor([piece], device=self.model.device)
        mask = torch.ones(1, prompt.done, dtype=torch.long, device=self.model.device)
        positions = torch.arange(start, prompt.done, device=self.model.device)[None]
        logits = self.model.forward(ids, prompt.cache, mask, positions)
        if prompt.done == len(prompt.ids):
            self._join([prompt], prompt.cache, logits)
        return len(piece)

    def _join(self, group: list[_Prompt], cache: Any, logits: torch.Tensor) -> None:
        """The answers to prompts that were read run from now on; `logits` [prompts, vocabulary] choose their first tokens."""
        self._batch.add(cache, [prompt.answers for prompt in group], [len(prompt.ids) for prompt in group])
        with self._wake:
            for _ in group:
                self._waiting.popleft()
        self.metrics.count_prompt(sum(len(prompt.ids) for prompt in group))
        answers = [answer for prompt in group for answer in prompt.answers]
        if len(answers) > len(group):
            logits = logits[[row for row, prompt in enumerate(group) for _ in prompt.answers]]
        self._append(answers, logits)

    def _decode(self) -> None:
        if self._batch.owners:
            logits = self._batch.step([answer.last for answer in self._batch.owners])
            self._append(list(self._batch.owners), logits)

    def _append(self, answers: list[_Answer], logits: torch.Tensor) -> None:
        """Choose the next token of each answer from its row, tell it, and let those leave that have ended."""
        chosen = 0
        for answer, choice in zip(answers, choose([answer.sampler for answer in answers], logits), strict=True):
            if answer.job.cancelled:
                continue
            if choice is None:
                why = "the model's logits are not finite: the weights or their number format are at fault"
                self._fail(answer.job, Refusal(500, why, code="not_finite"))
                continue
            chosen += 1
            self._advance(answer, choice)
        self.metrics.count_tokens(chosen)
        self._leave()

    def _advance(self, answer: _Answer, choice: Choice) -> None:
        if not answer.job.first_token:
            answer.job.first_token = True
            self.metrics.observe_first_token(time.monotonic() - answer.job.created)
        answer.last, answer.count = choice.token, answer.count + 1
        if choice.token in self.model.stop_ids and not answer.options.ignore_eos:
            self._tell(answer, answer.text.finish(), None, "stop")
            return
        text = answer.text.push(choice.token)
        if answer.text.stopped:
            self._tell(answer, text, choice, "stop")
        elif answer.count >= answer.options.max_tokens:
            text += answer.text.finish()
            self._tell(answer, text, choice, "stop" if answer.text.stopped else "length")
        else:
            self._tell(answer, text, choice, None)

    def _tell(self, answer: _Answer, text: str, choice: Choice | None, reason: str | None) -> None:
        answer.untold += 1
        if choice is not None:
            answer.choices.append(choice)
        if answer.job.whole and reason is None:
            answer.held += text
            return
        piece = Piece(answer.number, answer.held + text, tuple(answer.choices), answer.untold, reason)
        answer.held, answer.untold = "", 0
        answer.choices.clear()
        if reason is not None:
            answer.ended = True
            answer.job.open -= 1
        answer.job.deliver(piece)
