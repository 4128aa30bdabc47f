"""An evaluation from its settings to its files: every task with every model, what is finished kept, what fails named.

One model is in memory at a time. Judges come last, since they read what the models wrote.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_llm.evaluate.choice import run_choice
from megatron_llm.evaluate.choice_data import load_questions, question_files
from megatron_llm.evaluate.folders import Parts, find_parts
from megatron_llm.evaluate.generation import load_prompts, read_generations, run_generation
from megatron_llm.evaluate.judge import Judge, run_judge
from megatron_llm.evaluate.lm_harness import run_harness, task_files
from megatron_llm.evaluate.model import EvaluatedModel, opened
from megatron_llm.evaluate.options import ChoiceTask, Evaluation, GenerationTask, HarnessTask, JudgeTask, PerplexityTask, Task
from megatron_llm.evaluate.page import html_page
from megatron_llm.evaluate.perplexity import load_texts, run_perplexity, text_files
from megatron_llm.evaluate.results import FORMAT, Store, TaskResult, digest, file_digest
from megatron_llm.evaluate.table import console_table, csv_table, json_results
from megatron_llm.lora.loaded import choose_device
from megatron_llm.utils.atomic import make_folder, write_json, write_text
from megatron_llm.utils.errors import UserError, first_line
from megatron_llm.utils.progress import Progress

log = logging.getLogger(__name__)


class Run:
    """The state of one evaluation: what is finished, and what failed with its reason."""

    def __init__(self, evaluation: Evaluation, report: Callable[[str], None]) -> None:
        self.evaluation, self.report = evaluation, report
        self.store = Store(make_folder(evaluation.output))
        self.results: dict[str, dict[str, TaskResult]] = {name: {} for name in evaluation.models}
        self.failures: dict[str, str] = {}
        self._inputs: dict[str, Any] = {}  # digests of tasks, by name
        self._device = choose_device(evaluation.device)

    def run(self) -> None:
        """Everything, then the files. UserError at the end when something failed, which names it."""
        for name, task in self.evaluation.tasks.items():
            self._inputs[name] = {"format": FORMAT, "task": asdict(task), "files": _file_digests(task)}
        for model in self.evaluation.models:
            self._run_model(model)
        for name, task in self.evaluation.tasks.items():
            if isinstance(task, JudgeTask):
                for model in self.evaluation.models:
                    self._run_judge(model, name, task)
        self._write()

    def _run_model(self, name: str) -> None:
        tasks = {task: options for task, options in self.evaluation.tasks.items() if not isinstance(options, JudgeTask)}
        with ExitStack() as stack:
            parts: list[Parts] = []
            if not self._attempt(name, lambda: parts.append(find_parts(self.evaluation.models[name], self.report))):
                return
            identity = parts[0].identity() | {"dtype": self.evaluation.dtype, "device": self._device.partition(":")[0]}
            keys = {task: digest([self._inputs[task], identity]) for task in tasks}
            model: EvaluatedModel | None = None
            for task, options in tasks.items():
                if self._is_kept(name, task, options, keys[task]):
                    continue
                if model is None:
                    loaded: list[EvaluatedModel] = []
                    if not self._attempt(name, lambda loaded=loaded: loaded.append(stack.enter_context(self._open(parts[0])))):  # type: ignore[misc]
                        return
                    model = loaded[0]
                self._attempt(f"{name}/{task}", self._pair(model, name, task, options, keys[task]))

    def _open(self, parts: Parts) -> Any:
        settings = self.evaluation
        return opened(parts, device=self._device, dtype=settings.dtype, batch_size=settings.batch_size, report=self.report)

    def _is_kept(self, model: str, task: str, options: Task, key: str) -> bool:
        kept = self.store.load(model, task, key)
        if kept is None or (isinstance(options, GenerationTask) and not self.store.generations(model, task).is_file()):
            return False
        self.results[model][task] = kept
        self.report(f"{model}: {task}: kept from an earlier run")
        return True

    def _pair(self, model: EvaluatedModel, name: str, task: str, options: Task, key: str) -> Callable[[], None]:
        def work() -> None:
            result = _run_task(model, options, f"{name}: {task}", self.store.generations(name, task))
            self._keep(name, task, key, result)

        return work

    def _run_judge(self, model: str, name: str, task: JudgeTask) -> None:
        if model == task.against:
            return
        sources = [model] if task.against is None else [model, task.against]
        missing = [source for source in sources if task.of not in self.results[source]]
        if missing:
            self.failures[f"{model}/{name}"] = f"there are no answers of {missing[0]} to '{task.of}' to judge"
            return
        files = [self.store.generations(source, task.of) for source in sources]
        key = digest([self._inputs[name], [file_digest(file) for file in files]])
        if self._is_kept(model, name, task, key):
            return

        def work() -> None:
            answers = [read_generations(file)[: task.limit] for file in files]
            with Progress(f"{model}: {name} (answers)", len(answers[0])) as progress:
                others = answers[1] if task.against is not None else None
                self._keep(model, name, key, run_judge(task, answers[0], others, Judge(task), progress.advance))

        self._attempt(f"{model}/{name}", work)

    def _keep(self, model: str, task: str, key: str, result: TaskResult) -> None:
        self.store.save(model, task, key, result)
        self.results[model][task] = result
        for note in result.notes:
            self.report(f"{model}: {task}: {note}")

    def _attempt(self, name: str, work: Callable[[], Any]) -> bool:
        """Do it; a failure is kept under the name, so that the rest goes on."""
        try:
            work()
        except UserError as error:
            self.failures[name] = str(error)
        except Exception as error:  # a defect of one task or model must not take the results of the others
            log.exception("%s failed", name)
            self.failures[name] = f"{type(error).__name__}: {first_line(error)}"
        else:
            return True
        self.report(f"{name}: failed: {self.failures[name]}")
        return False

    def _write(self) -> None:
        folder, found = Path(self.evaluation.output), {model: tasks for model, tasks in self.results.items() if tasks}
        settings = asdict(self.evaluation) | {"device": self._device}
        write_json(folder / "results.json", json_results(found, self.failures, settings))
        if found:
            write_text(folder / "results.csv", csv_table(found))
            write_text(folder / "results.html", html_page(found, self.failures))
            self.report(console_table(found))
            self.report(f"written: {folder}/results.json, results.csv, results.html")
        if self.failures:
            told = "; ".join(f"{name} ({reason})" for name, reason in self.failures.items())
            raise UserError(f"{len(self.failures)} of the evaluations failed, the results of the others are in {folder}: {told}")


def run_evaluation(evaluation: Evaluation, report: Callable[[str], None] = print) -> Mapping[str, Mapping[str, TaskResult]]:
    """Evaluate, write results.json, results.csv and results.html, and return the results by model and task.

    UserError at the end when a model or a task failed; what the others gave is written all the same.
    """
    run = Run(evaluation, report)
    run.run()
    return run.results


def check_inputs(evaluation: Evaluation) -> Iterator[str]:
    """A line for each model and task that can be read, without loading a model. UserError for the first that cannot."""
    for name, entry in evaluation.models.items():
        parts = find_parts(entry, lambda line: None)
        yield f"model {name}: {parts.weights}" + "".join(f" + {adapter}" for adapter in parts.adapters)
    for name, task in evaluation.tasks.items():
        _file_digests(task)
        if isinstance(task, ChoiceTask):
            yield f"task {name}: {len(load_questions(task).questions)} questions"
        elif isinstance(task, GenerationTask):
            yield f"task {name}: {len(load_prompts(task))} prompts"
        elif isinstance(task, PerplexityTask):
            yield f"task {name}: {len(load_texts(task))} texts, {sum(path.suffix == '.bin' for path in text_files(task))} datasets"
        else:
            yield f"task {name}: {'judged by ' + task.model if isinstance(task, JudgeTask) else 'lm-eval: ' + ', '.join(task.tasks)}"


def _run_task(model: EvaluatedModel, task: Task, title: str, generations: Path) -> TaskResult:
    if isinstance(task, ChoiceTask):
        questions = load_questions(task)
        with Progress(f"{title} (questions)", len(questions.questions)) as progress:
            return run_choice(model, task, questions, progress.advance)
    if isinstance(task, GenerationTask):
        asked = load_prompts(task)
        with Progress(f"{title} (prompts)", len(asked)) as progress:
            return run_generation(model, task, asked, generations, progress.advance)
    if isinstance(task, PerplexityTask):
        with Progress(f"{title} (tokens)") as progress:

            def start(tokens: int) -> None:
                progress.total = tokens

            return run_perplexity(model, task, load_texts(task), start, progress.advance)
    assert isinstance(task, HarnessTask)
    return run_harness(model, task)


def _file_digests(task: Task) -> dict[str, str]:
    if isinstance(task, ChoiceTask):
        files = question_files(task)
    elif isinstance(task, GenerationTask):
        files = [Path(path) for path in task.data]
    elif isinstance(task, PerplexityTask):
        files = text_files(task)
    else:
        files = task_files(task) if isinstance(task, HarnessTask) else []
    return {str(path): file_digest(path) for path in files}
