"""READ FIRST: a recipe becomes a source, an objective and an engine, and then there is one loop.

    records -> Examples -> RecordSource --(window of ViewBatches)--> Trainer --(TokenScores)--> Objective
                               ^ noise/ adds the noise                  ^ models/ has the model     ^ sums and counts

The loop in `_learn_in` is the whole of training. Another objective changes `assembly.make_objective`, another origin of
batches changes `assembly.make_source`; nothing else knows which one it is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from dfactory import allocator, distributed
from dfactory.algorithms import Data
from dfactory.assembly import (
    make_eval_source,
    make_measure,
    make_objective,
    make_policy,
    make_probe,
    make_reference,
    make_rollout_source,
    make_source,
    policy_notes,
    policy_warnings,
    read_inputs,
    with_drafts,
)
from dfactory.engine import checkpoint
from dfactory.engine.preemption import EXIT_PREEMPTED, Preemption
from dfactory.engine.trainer import Trainer, zero_stage
from dfactory.planning.speed import Speed
from dfactory.recipe import Recipe
from dfactory.rl.access import lock_local_cluster
from dfactory.rl.scoring import check_rewards
from dfactory.rl.source import RolloutClient
from dfactory.runs.account import Account, Before, rows_of_files
from dfactory.runs.callbacks import load_callbacks
from dfactory.runs.course import Course
from dfactory.runs.folder import RunFolder
from dfactory.runs.lineage import HELD_OUT, TRAINED_ON
from dfactory.runs.metrics import MetricsLog
from dfactory.runs.nonfinite import NonFiniteGuard
from dfactory.runs.ownership import held_by_run, one_run
from dfactory.runs.precision import settled, slow_precision
from dfactory.runs.profiling import StepProfiler
from dfactory.runs.sanity import SanityChecks
from dfactory.runs.trackers import check_trackers
from dfactory.types import TrainState, ViewBatch


def train(recipe: Recipe) -> int:
    """Run a recipe to its end. Returns the exit status: 0 done, 75 preempted after a saved checkpoint."""
    check_trackers(recipe)
    if recipe.algorithm.data is Data.PROMPTS:
        read_inputs(recipe)  # a bad row is an error before anything is started
        check_rewards(recipe)
        lock_local_cluster()  # before Ray is imported
        from dfactory.rl.cluster import run  # Ray is an extra

        with held_by_run(RunFolder(recipe.output_dir)):
            return run(recipe, learn)
    return learn(recipe)


def learn(recipe: Recipe, client: RolloutClient | None = None) -> int:
    """Train on one rank. `client` is where its rollouts come from, in reinforcement learning."""
    preemption = Preemption()
    distributed.start()
    folder = RunFolder(recipe.output_dir)
    with one_run(folder, driven=client is not None):
        status = _learn_in(folder, recipe, client, preemption)
    distributed.leave_at_exit()
    return status


def _learn_in(folder: RunFolder, recipe: Recipe, client: RolloutClient | None, preemption: Preemption) -> int:
    """The training loop, in a folder that no other run writes to."""
    run = Run(folder, recipe, client)
    state, source, trainer = run.state, run.source, run.trainer
    with run.logging():
        if recipe.eval_on_start and state.step == 0:
            run.evaluate()
        last = state.step >= run.num_steps
        while not last and (window := run.next_window()) is not None:
            with run.profiler.step(state.step + 1):
                metrics = trainer.train_window(window, run.objective) | source.metrics
            state.advance(metrics)
            allocator.bound_freed_memory()
            last = state.step == run.num_steps
            run.check(window, metrics, last)
            if run.course.evaluation_is_due(state.step, last):
                run.evaluate()
                last = run.ends_early() or last
            preempted = distributed.any_rank(preemption.requested)
            if preempted or run.course.save_is_due(state.step, last, run.evaluated == state.step):
                run.save(last)
            if preempted and not last:
                preemption.leave()
                return EXIT_PREEMPTED
        if not last:
            run.run_out()
        run.name_best()
    return 0


class Run:
    """All that the loop works with, made from the recipe or from the checkpoint that it resumes, and what it leaves."""

    def __init__(self, folder: RunFolder, recipe: Recipe, client: RolloutClient | None):
        self.folder = folder
        self.log: MetricsLog | None = None  # rank 0 has one
        self.rank, self.world_size = distributed.start()
        found, self.warnings = checkpoint.find_resume(
            folder, recipe.resume_from_checkpoint, recipe.overwrite_output_dir
        )
        resumes = [found] if found is not None else []
        on = distributed.device().type
        precision = distributed.on_first_rank(lambda: settled(recipe, on, resumes))
        self.recipe, self.precision_note = precision.recipe(recipe), precision.note
        if self.rank == 0:
            self.warnings += slow_precision(recipe, on)
        self.resumed = checkpoint.resume_from(found, self.recipe) if found is not None else None
        self.state = self.resumed.state if self.resumed is not None else TrainState()
        self.cursor = self.state.source if self.resumed is not None else None
        self._read()
        self.account = self._open_account() if self.rank == 0 else None
        self.callbacks = load_callbacks(self.recipe) if self.rank == 0 else []
        self._assemble(client)
        self.course = Course(self.recipe, folder, self.source.epoch)
        self.evaluated = self.saved = self.state.step

    def _read(self) -> None:
        """Records and what is made of them, before any weight is read."""
        recipe = self.recipe
        self.inputs = inputs = read_inputs(recipe, recipe.streaming)
        self.warnings += inputs.vocabulary.warnings
        if self.resumed is not None and inputs.vocabulary.chosen_mask is not None:
            checkpoint.refuse_other_mask(self.resumed.path, inputs.special.mask)
        self.records = make_source(recipe, inputs, self.rank, self.world_size) if inputs.train is not None else None
        if self.records is not None and self.resumed is not None:
            with self.resumed.naming_changes():
                self.records.load_state_dict(self.cursor)
        self.objective = make_objective(recipe, inputs)
        self.probe = make_probe(recipe, inputs)
        self.num_steps = recipe.max_steps or self.state.step + self.records.num_windows

    def _open_account(self) -> Account:
        """What the checkpoints will say of where the model comes from."""
        known = {TRAINED_ON: self.inputs.train, HELD_OUT: self.inputs.held_out}
        rows = {use: rows_of_files(examples) for use, examples in known.items() if examples is not None}
        before = None
        if self.resumed is not None:
            before = Before(self.resumed.path, self.resumed.state.step, self.resumed.other_recipe)
        return Account(self.recipe, rows, self.world_size, before)

    def _assemble(self, client: RolloutClient | None) -> None:
        """The engine, the source and what watches them, at the step where the run begins."""
        recipe, inputs, resumed = self.recipe, self.inputs, self.resumed
        universal = resumed is not None and checkpoint.needs_universal(
            resumed.path, zero_stage(recipe), self.world_size, recipe.expert_parallel_size
        )
        if universal:
            checkpoint.refuse_resharding(resumed.path, recipe.optim)
        policy = make_policy(recipe, inputs.vocabulary.new_mask)
        self.trainer = trainer = Trainer(recipe, policy, self.num_steps, load_universal=universal)
        self.warnings += policy_warnings(recipe, trainer.policy, inputs.special.mask)
        self.with_reference = make_reference(recipe, inputs, trainer, self.num_steps - self.state.step, self.cursor)
        if client is None:
            self.source = self.with_reference(with_drafts(recipe, inputs, self.records, trainer))
        else:
            self.source = make_rollout_source(recipe, inputs, client, trainer)
        self.guard = NonFiniteGuard(self.folder, recipe.skip_nonfinite, self.rank, self.world_size)
        if resumed is not None:  # now that the reference has read the initial weights
            checkpoint.load(trainer, resumed.path, universal=universal)
            if client is not None:
                self.source.load_state_dict(self.cursor)
        self.speed = Speed(recipe, trainer.policy) if self.rank == 0 else None
        self.profiler = StepProfiler(recipe.profile_steps, self.folder.path, self.rank)
        self.sanity = SanityChecks(recipe, trainer, eos_id=inputs.special.eos, vocab_size=inputs.vocabulary.size)

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """On rank 0, start the run folder and its log, which says where the run stands."""
        if self.rank != 0:
            yield
            return
        begins = (self.resumed.state.step, self.resumed.other_recipe) if self.resumed is not None else ()
        aside = self.folder.start(self.recipe, *begins)
        with MetricsLog(self.recipe, self.folder, self.num_steps, self.state.step) as self.log:
            for warning in [*self.warnings, *(f"{path} is set aside: it may be removed" for path in aside)]:
                self.log.warn(warning)
            notes = (
                self.precision_note,
                self.inputs.vocabulary.mask_note,
                policy_notes(self.trainer.policy),
                self.trainer.activations_note,
                self.trainer.compiling_note,
                allocator.note(),
            )
            for note in filter(None, notes):
                self.log.say(note)
            if self.records is not None:
                self.log.say(f"{self.inputs.train.report}\n{self.records.window_size} a step")
            if self.resumed is not None:
                self.log.say(str(self.resumed))
            self.log.say(f"{self.num_steps} steps from step {self.state.step}, into {self.folder.path}")
            yield

    def next_window(self) -> list[ViewBatch] | None:
        """This rank's micro-batches of the next global batch; None after the last record."""
        with self.trainer.phases("batch"):
            return self.source.next_window()

    def check(self, window: list[ViewBatch], metrics: dict[str, float], last: bool) -> None:
        """Check the step that has just been finished, and log it."""
        state = self.state
        self.course.stepped(self.source.epoch)
        metrics |= self.guard.check(state, window, self.trainer.losses, metrics["grad_norm"])
        self.source.check(metrics)
        found, warnings = self.sanity.check(state.step, metrics, last)
        if self.log is not None:
            self.account.stepped(metrics)
            found |= self.speed.of(window, metrics)
            self.log.step(state.step, self.source.epoch, metrics | found, warnings)
        for callback in self.callbacks:
            callback.on_step(state.step, metrics | found)

    def evaluate(self) -> None:
        """Score the held-out records, and decode some of their prompts."""
        self.evaluated = self.state.step
        if self.inputs.held_out is None:
            return
        with self.trainer.phases("evaluation"), self.trainer.averaged():
            results, decoded, previews = self._measured()
        if self.log is not None:
            self.account.evaluated(self.state.step, results | decoded)
            self.log.evaluation(self.state.step, results | decoded, previews)
        for callback in self.callbacks:
            callback.on_evaluate(self.state.step, results | decoded)

    def _measured(self) -> tuple[dict[str, float], dict[str, float], list[dict[str, Any]]]:
        """Losses, what decoding found, and the prompts that were decoded."""
        held_out = self.with_reference(make_eval_source(self.recipe, self.inputs, self.rank, self.world_size))
        results = self.trainer.evaluate(held_out, make_measure(self.recipe, self.objective))
        decoded, previews = self.probe.measure(self.trainer) if self.probe is not None else ({}, [])
        return results, decoded, previews

    def ends_early(self) -> bool:
        """Whether evaluations have stopped getting better, after the one that has just been made."""
        if not self.course.ends_early():
            return False
        if self.log is not None:
            recipe = self.recipe
            self.log.say(
                f"{recipe.metric_for_best_model} has not got better in {recipe.early_stopping_patience} evaluations: the "
                f"run ends at step {self.state.step} of {self.num_steps}"
            )
        return True

    def name_best(self) -> None:
        """Let the run folder stand for its best checkpoint, where the recipe asks for it."""
        recipe = self.recipe
        if not recipe.load_best_model_at_end or self.log is None:
            return
        best = self.folder.name_best(recipe.metric_for_best_model, recipe.smaller_is_better)
        if best is None:
            self.log.warn(
                f"no checkpoint has a value of {recipe.metric_for_best_model}: the newest one stands for the run"
            )
        else:
            self.log.say(f"the best by {recipe.metric_for_best_model}: {best}")

    def save(self, last: bool) -> None:
        """Write a checkpoint, from which the run can be resumed."""
        self.state.source, state = self.source.state_dict(), self.state
        lineage = self.account and self.account.text(state.step, state.tokens, last=last)
        with self.trainer.phases("save"):
            saved = checkpoint.save(self.trainer, self.folder, state, self.recipe.save_total_limit, lineage)
        self.saved = self.state.step
        if self.log is not None:
            self.log.say(f"saved {saved}")
        for callback in self.callbacks:
            callback.on_save(self.state.step, saved)

    def run_out(self) -> None:
        """The records ended before the last step: evaluate and save what there is."""
        if self.log is not None:
            self.log.warn(f"the records ended at step {self.state.step} of {self.num_steps}: the run ends here")
        if self.evaluated < self.state.step and self.recipe.eval_strategy != "no":
            self.evaluate()
        if self.saved < self.state.step:
            self.save(last=False)
