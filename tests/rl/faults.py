"""Breaks RL runs at random times on a Ray cluster of three nodes, and shows that every one ends by itself:

    python -m tests.rl.faults --runs 20 --seed 0

A run gets several faults that it has to survive, and at last perhaps one that ends it. Ended, it has exited 0, or with a
message that names the culprit, within a bound; every prompt was consumed once, in order; no process of it is left. A run
that was ended is taken up again from its checkpoint by the next one. Prints a table; the exit status is 1 if any promise
was broken.
"""

import argparse
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from dfactory.rl.access import lock_local_cluster

lock_local_cluster()  # before Ray is imported

from tests.rl.fault_kinds import BLAME, FATAL, SURVIVED, Fault  # noqa: E402
from tests.rl.fault_nodes import Nodes  # noqa: E402
from tests.rl.fault_runs import BOUND_S, SHAPES, STEPS, Run, consumed_wrongly, left_processes  # noqa: E402


def judge(run: Run, status: int | None) -> tuple[str, str]:
    """(outcome, complaint) of an ended run."""
    if status is None:
        return "hung", f"did not end within {BOUND_S:.0f} s"
    if wrong := consumed_wrongly(run.folder):
        return "prompts wrong", wrong
    if left := left_processes(run.nodes):
        return "left behind", ", ".join(left)
    if status == 0:
        return "finished", ""
    blames = {strike.fault.blame for strike in run.strikes} | {"rollout", "reward worker"}
    if status == -signal.SIGKILL and "driver" in blames:
        return "named", ""
    named = any(re.search(BLAME[blame], run.last_words(), re.DOTALL) for blame in blames & BLAME.keys())
    return ("named", "") if named else ("no culprit", run.last_words())


def break_one(run: Run, faults: list[Fault], last_step: int) -> tuple[str, str]:
    """Let the faults strike at random steps, and wait for the end: (outcome, complaint)."""
    steps = range(last_step - STEPS, last_step - 4)
    for fault, step in zip(faults, sorted(run.chance.choices(steps, k=len(faults))), strict=True):
        if not run.wait_for_step(step):
            break
        run.strike(fault)
    return judge(run, run.wait())


def tally(table: Counter, run: Run, outcome: str) -> None:
    """Count each fault under what became of it: one after which a step was finished was survived."""
    last = run.steps()[-1]["step"] if run.steps() else 0
    for strike in run.strikes:
        became = outcome
        if outcome == "finished" or (outcome == "named" and last > strike.step):
            became = "survived"
        elif outcome == "named" and strike is not run.strikes[-1]:
            became = "overtaken"  # by a later one, before the next step
        table[strike.fault.name, strike.fault.target, became] += 1


def print_table(table: Counter) -> None:
    outcomes = ["survived", "overtaken", "named", "hung", "prompts wrong", "left behind", "no culprit"]
    print(f"\n{'fault':<18}{'target':<22}" + "".join(f"{name:>14}" for name in outcomes))
    for name, target in sorted({key[:2] for key in table}):
        print(f"{name:<18}{target:<22}" + "".join(f"{table[name, target, outcome]:>14}" for outcome in outcomes))
    totals = [sum(count for key, count in table.items() if key[2] == outcome) for outcome in outcomes]
    print(f"{'all':<40}" + "".join(f"{total:>14}" for total in totals) + f"\n{sum(totals)} faults")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=5, help="of a run, to be survived")
    parser.add_argument("--only", default="", help="faults whose name and target hold this text")
    parser.add_argument("--plan", help="names as in the table, with semicolons between: what every run gets")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so long")
    arguments = parser.parse_args()
    chance, table, broken = random.Random(arguments.seed), Counter(), []
    base = Path(tempfile.mkdtemp(prefix="faults"))
    survived = [fault for fault in SURVIVED if arguments.only in str(fault)]
    fatal = [fault for fault in FATAL if arguments.only in str(fault)]
    nodes, folder, last_step, shape, started = None, base / "0", STEPS, SHAPES[0], time.monotonic()
    chance.shuffle(fatal)
    for number in range(arguments.runs):
        if time.monotonic() - started > 60 * arguments.minutes:
            break
        if nodes is None or not nodes.head_is_whole():
            if nodes is not None:
                nodes.close()
            nodes = Nodes()
        nodes.repair()
        if arguments.plan:
            known = {str(fault): fault for fault in (*SURVIVED, *FATAL)}
            faults = [known[name.strip()] for name in arguments.plan.split(";")]
        else:
            faults = chance.choices(survived, k=arguments.faults) if survived else []
            if fatal and (not faults or chance.random() < 0.6):
                faults.append(fatal[number % len(fatal)])
        folder.mkdir(exist_ok=True)
        before = time.monotonic()
        run = Run(nodes, folder, chance, shape, last_step)
        outcome, complaint = break_one(run, faults, last_step)
        tally(table, run, outcome)
        done = ", ".join(str(strike.fault) for strike in run.strikes)
        print(
            f"run {number} ({' '.join(shape)}): {outcome} after {time.monotonic() - before:.0f} s: {done}", flush=True
        )
        if complaint:
            broken.append(number)
            print(f"    {complaint}\n    in {folder}", flush=True)
        if outcome == "named" and (folder / "run" / "LATEST").is_file():  # the next run goes on
            last_step = int((folder / "run" / "LATEST").read_text().strip().rpartition("-")[2]) + STEPS
        else:
            folder, last_step = base / str(number + 1), STEPS
            shape = SHAPES[chance.random() < 0.25]
    if nodes is not None:
        nodes.close()
    print_table(table)
    if not broken:
        shutil.rmtree(base)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
