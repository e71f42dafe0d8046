"""Writes metrics to metrics.jsonl, to one console line per step, and to trackers."""

import math
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dfactory.console import plain_console
from dfactory.recipe import Recipe
from dfactory.runs.folder import RunFolder
from dfactory.runs.trackers import Trackers
from dfactory.uptime import running


class MetricsLog:
    """Used on the first rank only. A context manager, so that the progress bar and trackers are always closed."""

    def __init__(self, recipe: Recipe, folder: RunFolder, num_steps: int, first_step: int):
        self.recipe, self.folder, self.num_steps, self.first_step = recipe, folder, num_steps, first_step
        self.console = plain_console()
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=num_steps, completed=first_step)

    def __enter__(self) -> "MetricsLog":
        self.trackers = Trackers(self.recipe, self.folder, self.first_step)
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()
        self.trackers.finish()

    def step(self, step: int, epoch: float, metrics: dict[str, float], warnings: list[str] = ()) -> None:
        for warning in warnings:
            self.warn(warning)
        phase = {"block_size": self.recipe.block_size_at(step - 1)} if self.recipe.block_size_schedule else {}
        started = self._started() if step == self.first_step + 1 else {}
        self._write({"step": step, "epoch": round(epoch, 4), **phase, **metrics, **started})
        self.progress.update(self.task, completed=step, description=f"loss {metrics['loss']:.4f}")
        if step % self.recipe.logging_steps == 0 or step == self.num_steps:
            self.say(
                f"step {step}/{self.num_steps}  epoch {epoch:.2f}  loss {metrics['loss']:.4f}  "
                f"hit {metrics.get('hit_rate', math.nan):.3f}  {_stage_line(metrics)}"  # nan: no target in the global batch
                f"grad {metrics['grad_norm']:.3f}  lr {metrics['learning_rate']:.2e}  "
                f"{metrics['tokens_per_second']:,.0f} tok/s"
            )

    def _started(self) -> dict[str, float]:
        """How long the process took to its first step, which `dfactory check` foretells."""
        now = running()
        self.say(f"first step {now.wall_s:.1f} s after the process started, {now.cpu_s:.1f} s of the processor")
        return {"start_seconds": now.wall_s, "start_cpu_seconds": now.cpu_s}

    def evaluation(self, step: int, metrics: dict[str, float], previews: list[dict[str, Any]]) -> None:
        self._write({"step": step, **{f"eval/{name}": value for name, value in metrics.items()}})
        by_t = "  ".join(f"{n.removeprefix('loss_')} {v:.3f}" for n, v in metrics.items() if n.startswith("loss_t"))
        rest = _stage_line(metrics) or f"({by_t})"
        self.say(f"evaluation at step {step}: loss {metrics['loss']:.4f}  hit {metrics['hit_rate']:.3f}  {rest}")
        if "decoded" in metrics:
            self.say(
                f"{metrics['decoded']:.0f} prompts decoded: {metrics['tokens_per_forward']:.2f} tokens per forward, "
                f"exact match {metrics['exact_match']:.1%}"
            )
        if metrics.get("clipped_ratio") == 1.0:
            self.warn(
                f"none of the {metrics['decoded']:.0f} answers at step {step} ended with EOS: was it ever learnt?"
            )
        if previews:
            self.folder.append_previews([{"step": step, **preview} for preview in previews])
            self.trackers.table("previews", previews, step)
            first = previews[0]
            self.say(f"one of them: {first['expected']!r} was right, {first['answered']!r} was answered")

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)  # a log file has no terminal width

    def warn(self, text: str) -> None:
        """Print a warning in bold red on standard error."""
        plain_console(stderr=True).print(f"WARNING: {text}", style="bold red", soft_wrap=True)

    def _write(self, metrics: dict[str, Any]) -> None:
        self.folder.append_metrics(metrics)
        self.trackers.log(metrics)


def _stage_line(metrics: dict[str, float]) -> str:
    """The part of a line that is special to a stage: accuracy of pairs, or rewards of rollouts."""
    if "rewards/margins" in metrics:
        return f"accuracy {metrics['rewards/accuracies']:.3f}  margin {metrics['rewards/margins']:.4f}  "
    if "groups" in metrics:
        reward = f"{metrics['reward']:.3f}" if "reward" in metrics else "none"
        return (
            f"reward {reward}  unique {metrics['unique_fraction']:.2f}  "
            f"no signal {metrics['frac_reward_zero_std']:.0%}  {metrics['tokens_per_forward']:.2f} tokens/forward  "
        )
    return ""
