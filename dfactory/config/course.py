"""Rules between the keys of evaluating, saving and ending early, and of trackers: what is wrong with a recipe's."""

from collections.abc import Iterator

from dfactory.config.training import TRACKERS, TrainingKeys


def course_problems(keys: TrainingKeys) -> Iterator[str]:
    for name in ("save", "eval"):
        strategy, steps = getattr(keys, f"{name}_strategy"), getattr(keys, f"{name}_steps")
        if strategy != "steps" and steps is not None:
            yield f"{name}_steps {steps} with {name}_strategy {strategy}: set {name}_steps to null"
    yield from _problems_of_comparing(keys)
    if keys.early_stopping_threshold > 0 and keys.early_stopping_patience is None:
        yield f"early_stopping_threshold {keys.early_stopping_threshold:g} without early_stopping_patience: set it too"
    if keys.load_best_model_at_end and not _saves_where_it_evaluates(keys):
        yield (
            f"load_best_model_at_end true with save_strategy {keys.save_strategy}, save_steps {keys.save_steps} and "
            f"eval_strategy {keys.eval_strategy}, eval_steps {keys.eval_steps}: only an evaluated checkpoint can be the "
            "best; make save_steps a multiple of eval_steps, take epoch for both, or save_strategy best"
        )


def _problems_of_comparing(keys: TrainingKeys) -> Iterator[str]:
    """What needs evaluations that can be compared."""
    metric = keys.metric_for_best_model
    needing = {
        "load_best_model_at_end true": keys.load_best_model_at_end,
        f"early_stopping_patience {keys.early_stopping_patience}": keys.early_stopping_patience is not None,
        "save_strategy best": keys.save_strategy == "best",
    }
    for shown in (name for name, is_set in needing.items() if is_set):
        if metric is None or not metric.startswith("eval/"):
            yield (
                f"{shown} with metric_for_best_model {metric}: only evaluations are compared; take one of theirs, such as "
                "eval/loss"
            )
        if not keys.eval_datasets:
            yield f"{shown} and no eval_datasets, by which a checkpoint would be the best: name a file"
        if keys.eval_strategy == "no":
            yield f"{shown} with eval_strategy no: take steps or epoch"


def _saves_where_it_evaluates(keys: TrainingKeys) -> bool:
    """Whether each checkpoint has an evaluation at its step."""
    if keys.save_strategy in ("no", "best") or (keys.save_strategy == "steps" and keys.save_steps is None):
        return True
    if keys.save_strategy == "epoch" or keys.eval_strategy == "epoch":
        return keys.save_strategy == keys.eval_strategy
    return keys.eval_steps is not None and keys.save_steps % keys.eval_steps == 0


def tracker_problems(keys: TrainingKeys) -> Iterator[str]:
    """Their names, and options of those alone that are used."""
    for name in keys.report_to:
        if name not in TRACKERS:
            yield f"report_to {name} is not known: take of {', '.join(TRACKERS)}"
    if len(set(keys.report_to)) < len(keys.report_to):
        yield f"report_to {keys.report_to} names one twice"
    for name, options in keys.tracker_options.items():
        if name not in keys.report_to:
            yield f"tracker_options.{name}, and report_to does not name it: add it there"
        if not isinstance(options, dict):
            yield f"tracker_options.{name} {options!r}: give a mapping of options"
