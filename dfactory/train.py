"""READ FIRST: a recipe becomes a source, an objective and an engine, and then there is one loop.

    records -> Examples -> RecordSource --(window of ViewBatches)--> Trainer --(TokenScores)--> Objective
                               ^ views/ adds the noise                  ^ models/ has the model     ^ sums and counts

The loop at the bottom is the whole of training. Another objective changes `assembly.make_objective`, another origin of
batches changes `assembly.make_source`; nothing else knows which one it is.
"""

import contextlib

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
from dfactory.config.recipe import Recipe
from dfactory.engine import checkpoint, distributed
from dfactory.engine.gates import Gates
from dfactory.engine.metrics import MetricsLog
from dfactory.engine.nonfinite import NonFiniteGuard
from dfactory.engine.preemption import EXIT_PREEMPTED, Preemption
from dfactory.engine.runfolder import RunFolder
from dfactory.engine.trainer import Trainer, zero_stage
from dfactory.rl.access import lock_local_cluster
from dfactory.rl.scoring import check_rewards
from dfactory.rl.source import Feed
from dfactory.types import TrainState


def train(recipe: Recipe) -> int:
    """Run a recipe to its end. Returns the exit status: 0 done, 75 preempted after a saved checkpoint."""
    if recipe.stage == "rl":
        read_inputs(recipe), check_rewards(recipe)  # a bad row is told before anything is started
        lock_local_cluster()  # before Ray is imported
        from dfactory.rl.cluster import run  # Ray is an extra

        return run(recipe, learn)
    return learn(recipe)


def learn(recipe: Recipe, feed: Feed | None = None) -> int:
    """The training loop on one rank. `feed` is where its rollouts come from, in reinforcement learning."""
    preemption = Preemption()
    rank, world_size = distributed.start()
    folder = RunFolder(recipe.output_dir)
    resumed, warnings = checkpoint.find_resume(folder, recipe.resume_from_checkpoint, recipe.overwrite_output_dir)

    inputs = read_inputs(recipe, recipe.streaming)
    warnings += inputs.vocabulary.warnings
    records = make_source(recipe, inputs, rank, world_size) if inputs.train is not None else None
    objective = make_objective(recipe, inputs)
    probe = make_probe(recipe, inputs)
    num_steps = recipe.max_steps or records.num_windows
    universal = resumed is not None and checkpoint.needs_universal(
        resumed, zero_stage(recipe), world_size, recipe.expert_parallel_size
    )
    trainer = Trainer(recipe, make_policy(recipe), num_steps, load_universal=universal)
    warnings += policy_warnings(recipe, trainer.policy)
    with_reference = make_reference(recipe, inputs, trainer, num_steps, resuming=resumed is not None)
    if feed is None:
        source = with_reference(with_drafts(recipe, inputs, records, trainer))
    else:
        source = make_rollout_source(recipe, inputs, feed, trainer)

    guard = NonFiniteGuard(folder, recipe.skip_nonfinite, rank, world_size)
    state = TrainState()
    if resumed is not None:
        checkpoint.load(trainer, resumed, universal=universal)
        state = checkpoint.read_state(resumed)
        source.load_state_dict(state.source)
    gates = Gates(recipe, trainer, eos_id=inputs.special.eos, vocab_size=inputs.vocabulary.size)
    if rank == 0:
        aside = folder.start(recipe, resume_step=state.step if resumed is not None else None)
        warnings += [f"{path} is set aside: it may be removed" for path in aside]

    with MetricsLog(recipe, folder, num_steps, state.step) if rank == 0 else contextlib.nullcontext() as log:
        if log:
            for warning in warnings:
                log.warn(warning)
            if records is not None:
                log.say(f"{inputs.train.report}\n{records.rows_per_window} rows a step")
            log.say(f"{num_steps} steps from step {state.step}, into {folder.path}")
        while state.step < num_steps and (window := source.next_window()) is not None:
            metrics = trainer.train_window(window, objective) | source.metrics
            state.advance(metrics)
            metrics |= guard.check(state, window, trainer.losses, metrics["grad_norm"])
            source.check(metrics)
            last = state.step == num_steps
            found, warnings = gates.check(state.step, metrics, last)
            metrics |= found
            if log:
                log.step(state.step, source.epoch, metrics, warnings)
            if inputs.held_out is not None and (last or is_due(recipe.eval_steps, state.step)):
                held_out = with_reference(make_eval_source(recipe, inputs, rank, world_size))
                results = trainer.evaluate(held_out, make_measure(recipe, objective))
                decoded, previews = probe.measure(trainer) if probe is not None else ({}, [])
                if log:
                    log.evaluation(state.step, results | decoded, previews)
            preempted = distributed.any_rank(preemption.requested)
            if preempted or last or is_due(recipe.save_steps, state.step):
                state.source = source.state_dict()
                saved = checkpoint.save(trainer, folder, state, recipe.save_total_limit)
                if log:
                    log.say(f"saved {saved}")
            if preempted and not last:
                preemption.leave()
                return EXIT_PREEMPTED
    return 0


def is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
