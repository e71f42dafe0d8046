"""READ FIRST: a recipe becomes a source, an objective and an engine, and then there is one loop.

    records -> Examples -> RecordSource --(window of ViewBatches)--> Trainer --(TokenScores)--> Objective
                               ^ noise/ adds the noise                  ^ models/ has the model     ^ sums and counts

The loop at the bottom is the whole of training. Another objective changes `assembly.make_objective`, another origin of
batches changes `assembly.make_source`; nothing else knows which one it is.
"""

import contextlib

from dfactory import distributed
from dfactory.assembly import (
    make_eval_source,
    make_measure,
    make_objective,
    make_policy,
    make_probe,
    make_reference,
    make_rollout_source,
    make_source,
    policy_warnings,
    read_inputs,
    with_drafts,
)
from dfactory.engine import checkpoint
from dfactory.engine.preemption import EXIT_PREEMPTED, Preemption
from dfactory.engine.trainer import Trainer, zero_stage
from dfactory.recipe import Recipe
from dfactory.rl.access import lock_local_cluster
from dfactory.rl.scoring import check_rewards
from dfactory.rl.source import Feed
from dfactory.runs.folder import RunFolder
from dfactory.runs.metrics import MetricsLog
from dfactory.runs.nonfinite import NonFiniteGuard
from dfactory.runs.ownership import held_by_run, one_run
from dfactory.runs.sanity import SanityChecks
from dfactory.types import TrainState


def train(recipe: Recipe) -> int:
    """Run a recipe to its end. Returns the exit status: 0 done, 75 preempted after a saved checkpoint."""
    if recipe.stage == "rl":
        read_inputs(recipe)  # a bad row is told before anything is started
        check_rewards(recipe)
        lock_local_cluster()  # before Ray is imported
        from dfactory.rl.cluster import run  # Ray is an extra

        with held_by_run(RunFolder(recipe.output_dir)):
            return run(recipe, learn)
    return learn(recipe)


def learn(recipe: Recipe, feed: Feed | None = None) -> int:
    """Train on one rank. `feed` is where its rollouts come from, in reinforcement learning."""
    preemption = Preemption()
    distributed.start()
    folder = RunFolder(recipe.output_dir)
    with one_run(folder, driven=feed is not None):
        return _learn_in(folder, recipe, feed, preemption)


def _learn_in(folder: RunFolder, recipe: Recipe, feed: Feed | None, preemption: Preemption) -> int:
    """The training loop, in a folder that no other run writes to."""
    rank, world_size = distributed.start()
    found, warnings = checkpoint.find_resume(folder, recipe.resume_from_checkpoint, recipe.overwrite_output_dir)
    resumed = checkpoint.resume_from(found, recipe) if found is not None else None
    state = resumed.state if resumed is not None else TrainState()
    cursor = state.source if resumed is not None else None

    inputs = read_inputs(recipe, recipe.streaming)
    warnings += inputs.vocabulary.warnings
    records = make_source(recipe, inputs, rank, world_size) if inputs.train is not None else None
    if records is not None and resumed is not None:
        with resumed.naming_changes():
            records.load_state_dict(cursor)
    objective = make_objective(recipe, inputs)
    probe = make_probe(recipe, inputs)
    num_steps = recipe.max_steps or state.step + records.num_windows
    universal = resumed is not None and checkpoint.needs_universal(
        resumed.path, zero_stage(recipe), world_size, recipe.expert_parallel_size
    )
    trainer = Trainer(recipe, make_policy(recipe), num_steps, load_universal=universal)
    warnings += policy_warnings(recipe, trainer.policy)
    with_reference = make_reference(recipe, inputs, trainer, num_steps - state.step, cursor)
    if feed is None:
        source = with_reference(with_drafts(recipe, inputs, records, trainer))
    else:
        source = make_rollout_source(recipe, inputs, feed, trainer)

    guard = NonFiniteGuard(folder, recipe.skip_nonfinite, rank, world_size)
    if resumed is not None:
        checkpoint.load(trainer, resumed.path, universal=universal)
        if feed is not None:
            source.load_state_dict(cursor)
    sanity = SanityChecks(recipe, trainer, eos_id=inputs.special.eos, vocab_size=inputs.vocabulary.size)
    if rank == 0:
        aside = folder.start(recipe, resumed.state.step, resumed.other_recipe) if resumed else folder.start(recipe)
        warnings += [f"{path} is set aside: it may be removed" for path in aside]

    with MetricsLog(recipe, folder, num_steps, state.step) if rank == 0 else contextlib.nullcontext() as log:

        def evaluate() -> int:
            if inputs.held_out is None:
                return state.step
            held_out = with_reference(make_eval_source(recipe, inputs, rank, world_size))
            results = trainer.evaluate(held_out, make_measure(recipe, objective))
            decoded, previews = probe.measure(trainer) if probe is not None else ({}, [])
            if log:
                log.evaluation(state.step, results | decoded, previews)
            return state.step

        def save() -> int:
            state.source = source.state_dict()
            saved = checkpoint.save(trainer, folder, state, recipe.save_total_limit)
            if log:
                log.say(f"saved {saved}")
            return state.step

        if log:
            for warning in warnings:
                log.warn(warning)
            if records is not None:
                log.say(f"{inputs.train.report}\n{records.rows_per_window} rows a step")
            if resumed is not None:
                log.say(str(resumed))
            log.say(f"{num_steps} steps from step {state.step}, into {folder.path}")
        evaluated = saved = state.step
        while state.step < num_steps and (window := source.next_window()) is not None:
            metrics = trainer.train_window(window, objective) | source.metrics
            state.advance(metrics)
            metrics |= guard.check(state, window, trainer.losses, metrics["grad_norm"])
            source.check(metrics)
            last = state.step == num_steps
            found, warnings = sanity.check(state.step, metrics, last)
            metrics |= found
            if log:
                log.step(state.step, source.epoch, metrics, warnings)
            if last or is_due(recipe.eval_steps, state.step):
                evaluated = evaluate()
            preempted = distributed.any_rank(preemption.requested)
            if preempted or last or is_due(recipe.save_steps, state.step):
                saved = save()
            if preempted and not last:
                preemption.leave()
                return EXIT_PREEMPTED
        if state.step < num_steps:
            if log:
                log.warn(f"the records ended at step {state.step} of {num_steps}: the run ends here")
            if evaluated < state.step:
                evaluate()
            if saved < state.step:
                save()
    return 0


def is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
