"""The claims of benchmarks/ that can be shown in seconds."""

import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    data,
    decoding,
    dpo_variance,
    gpu_check,
    growth,
    likelihood,
    loading,
    operations,
    overlap,
    packing,
    patterns,
    rl,
    step,
    table,
    tree,
)
from benchmarks.measuring import Elsewhere, Memory, Timed, interleave, row_of, write_rows
from dfactory.cli import main
from dfactory.models.registry import load_policy
from dfactory.recipe import load_recipe
from tests.batches import Document, make_batch
from tests.test_assets import DATA


@pytest.mark.slow
def test_shared_noise_and_pairs_cut_the_variance_of_a_margin_by_twenty(tmp_path, capsys):
    """The embedded model after ten steps of the quickstart's DPO against the one before."""
    keys = ["model_name_or_path=tiny", "max_steps=10", "warmup_steps=0", "eval_datasets=[]", f"output_dir={tmp_path}"]
    assert main(["train", str(DATA.parent / "dpo.yaml"), *keys]) == 0
    data = str(DATA / "pairs_heldout.jsonl")
    documents, mask_id = dpo_variance.read_pairs("tiny", data, count=8, block_size=16, max_length=64)
    models = [load_policy(path, dtype="float32") for path in (tmp_path, "tiny")]
    results = dpo_variance.compare(*models, documents, mask_id, views=2, replicates=12)
    for name in ("shared, pairs", "shared, exact, pairs"):
        assert results["naive"].variance > 20 * results[name].variance
        error = results["naive"].standard_error + results[name].standard_error
        assert abs(results[name].mean - results["naive"].mean) < 3 * error  # they estimate the same

    assert (
        dpo_variance.main(
            ["--policy", str(tmp_path), "--reference", "tiny", "--data", data, "--pairs", "2", "--replicates", "2"]
        )
        == 0
    )
    assert "naive / this" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [step, packing, decoding, rl])
def test_both_sides_of_a_benchmark_of_speed_compute_the_same(benchmark, capsys):
    """Losses over all steps, or tokens; a benchmark whose sides differ ends with status 1."""
    assert benchmark.main(["--smoke"]) == 0
    assert "opponent" in capsys.readouterr().out


@pytest.mark.slow
def test_the_elbo_of_many_views_is_that_of_separate_passes(capsys):
    assert likelihood.main(["--smoke"]) == 0
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.slow
def test_reinforcement_learning_with_and_without_waiting(capsys):
    """Two real runs on Ray; rollouts of the asynchronous one may be a version old."""
    assert overlap.main(["--smoke"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"asynchronous / synchronous \d+\.\d\d", shown)
    assert len(re.findall(r"^│ [01] ", shown, re.MULTILINE)) == 2


@pytest.mark.slow
def test_where_the_time_of_a_step_goes(capsys):
    """The parts add up to the step, each of them takes some of it, and operations are counted."""
    assert step.main(["--smoke", "--profile"]) == 0
    shown = capsys.readouterr().out
    first = shown[: shown.index("step  ")].splitlines()[1:]
    assert {line[:22].strip() for line in first} >= {"attention", "experts, backward", "head", "optimiser", "data"}
    shares = [float(line.split()[-1].rstrip("%")) for line in first]
    assert all(share >= 0 for share in shares)
    assert 99 < sum(shares) < 101
    assert not re.search(r"\b0 billion operations", shown)


@pytest.mark.slow
def test_growth_along_axes_of_one_process(capsys):
    """Longer documents take more positions; more experts take as many."""
    assert growth.main(["--smoke", "--axes", "length", "experts"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"length: exponent -?\d+\.\d+; over positions", shown)
    assert re.search(r"experts: exponent -?\d+\.\d+$", shown, re.MULTILINE)
    assert "linear in tokens within 15%" in shown


@pytest.mark.slow
def test_growth_over_ranks_counts_the_positions_of_all(capsys):
    assert growth.main(["--smoke", "--axes", "ranks", "--ranks", "2"]) == 0
    assert "896" in capsys.readouterr().out  # 2 ranks x 2 documents x (128 - 32 + 2 x 64)


def test_an_exponent_is_the_slope_of_logarithms():
    assert growth.fitted_exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert growth.fitted_exponent([2, 8], [5, 5]) == pytest.approx(0)


@pytest.mark.parametrize("seconds, verdict", [((1.0, 2.1, 4.4), "10%: linear"), ((1.0, 2.1, 5.0), "25%: NOT linear")])
def test_linear_means_seconds_a_position_that_hardly_differ(seconds, verdict):
    costs = {512 * n: growth.Cost(s, (s, s), 1000 * n, 1e9 * n, 0.0) for n, s in zip((1, 2, 4), seconds, strict=True)}
    costs[8192] = growth.Cost(1e3, (1e3, 1e3), 16000, 1.6e10, 0.0)  # beyond what is judged
    assert verdict in " ".join(growth.verdicts("length", costs))


@pytest.mark.slow
def test_reading_a_checkpoint_beside_reading_its_bytes(capsys):
    assert loading.main(["--smoke"]) == 0
    assert "memory while reading" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_of_data_tells_memory_and_rates(capsys):
    """The other parts run a tool that is tested beside the others."""
    assert data.main(["--smoke", "--parts", "rate", "start"]) == 0
    shown = capsys.readouterr().out
    assert "start, 0.00 GB" in shown
    assert "reader, " in shown


MIB = 2**20
ROOT = Path(__file__).parents[1]


class Side:
    """Parameters of 64 MiB; a step keeps 64 MiB from its first time on, and takes 128 MiB for a while."""

    def __init__(self):
        self.parameters, self.kept = [torch.ones(16 * MIB)], None

    def step(self, batch, documents):
        if self.kept is None:
            self.kept = torch.ones(16 * MIB)
        passing = torch.ones(32 * MIB)
        time.sleep(0.2)
        del passing


def test_memory_of_a_step_is_told_above_parameters_and_above_what_stays():
    """In a process of its own, as in the benchmark: this one has freed memory to give away."""
    code = "from benchmarks.measuring import measure_memory; from tests.test_benchmarks import Side\n"
    code += "memory = measure_memory(Side, None, None); print(memory.above_parameters, memory.above_state)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    above_parameters, above_state = (float(word) / MIB for word in done.stdout.split())
    assert above_parameters == pytest.approx(192, abs=48)
    assert above_state == pytest.approx(128, abs=48)


@pytest.mark.parametrize("bf16, fp32, equal", [(2.03, 2.0001, True), (2.0, 2.001, False), (2.1, 2.0, False)])
def test_a_loss_that_differs_in_any_step_is_noticed(bf16, fp32, equal):
    losses = {"opponent": [3.0, 2.0, 1.0], "fp32": [3.0, fp32, 1.0], "bf16": [3.0, bf16, 1.0]}
    timed = {name: Timed([1.0], values, [1.0]) for name, values in losses.items()}
    assert step.Result(timed).is_equal == equal


def test_sides_take_turns_and_warm_up_is_not_timed():
    order = []
    timed = interleave({"a": lambda n: order.append(("a", n)), "b": lambda n: order.append(("b", n))}, rounds=2)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [len(side.seconds) for side in timed.values()] == [2, 2]
    assert [len(side.results) for side in timed.values()] == [3, 3]


def test_a_shared_prompt_gives_the_same_loss_on_fewer_positions(capsys):
    """The benchmark at sizes that take seconds; its own sizes show the speed."""
    sizes = {"prompt": 40, "response": 16, "generations": 3, "block-size": 8, "hidden": 32, "layers": 2, "experts": 8}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert tree.main([*words, "--vocabulary", "128", "--repeats", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "192" in shown  # 3 x (48 clean + 16 of the view), against 40 + 3 x (8 + 16)
    assert "112" in shown
    assert "1.71 times fewer positions" in shown


def test_a_part_of_the_gpu_check_ends_in_time_with_all_that_it_started(tmp_path):
    """One that ignores the interrupt and has a child; the child's process is gone, the output is kept."""
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']);"
        "print('child', child.pid, flush=True); time.sleep(99)"
    )
    hangs = gpu_check.Part("hangs", "that it is ended", 2, [], [sys.executable, "-c", code])
    passes = gpu_check.Part("passes", "that later parts run", 30, [], [sys.executable, "-c", "print('done')"])
    outcomes = [gpu_check.run_part(part, dry_run=True) for part in (hangs, passes)]
    outcomes.append(gpu_check.run_part(passes._replace(name="late"), dry_run=True, left_s=1.0))
    assert [outcome.status for outcome in outcomes] == [None, 0, None]
    pid = int(outcomes[0].output.split()[1])
    assert not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text()
    gpu_check.write_results(tmp_path, {"gpu": None}, outcomes, 3.0)
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| hangs | that it is ended | not ended after 2 s |" in page
    assert "| late | that later parts run | not run: the time of the check is used up |" in page
    assert json.loads((tmp_path / "gpu_check.json").read_text())["parts"][1]["status"] == 0


def test_the_gpu_check_says_which_parts_there_are(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry-run", "--only", "nothing"])
    assert "the parts are tests, decoding, CUDA graphs," in capsys.readouterr().err


@pytest.mark.slow
def test_attention_patterns_are_measured_once(tmp_path, capsys):
    """A run is left out the second time, and refused where its settings were others."""
    words = ["--output", str(tmp_path), "--patterns", "full", "--seeds", "0", "--seconds", "2"]
    assert patterns.main(words) == 0
    first = capsys.readouterr().out
    assert "2 s of CPU time from base weights, seeds 0" in first
    assert re.search(r"│ full +│", first)
    file = tmp_path / "full-base-0/pattern.json"
    found = json.loads(file.read_text())
    assert found["parameters"] == 1_264_704
    assert found["steps"] > 2
    assert 0 <= found["exact match"] < 0.5
    made = file.stat().st_mtime_ns
    assert patterns.main(words) == 0
    assert capsys.readouterr().out == first
    assert file.stat().st_mtime_ns == made
    with pytest.raises(SystemExit, match=r"measured with .*2\.0.* take another --output"):
        patterns.main([*words[:-1], "3"])


def test_every_row_of_the_table_has_a_command_that_its_benchmark_takes(tmp_path, capsys):
    """`--list` shows it; a row of results becomes a line, a missing one its reason."""
    assert table.main(["--list", "--main", "elsewhere"]) == 0
    for line in capsys.readouterr().out.splitlines():
        name, _, command = line.partition(": python -m benchmarks.")
        assert name in table.ROWS
        assert "--main elsewhere" in command
    with pytest.raises(SystemExit):
        table.main(["--rows", "nothing"])
    sides = {"opponent": 4.0, "main": 2.0, "fp32": 1.0}
    timed = {name: Timed([2 * s] * 3, [1.0], [s] * 3) for name, s in sides.items()}
    memories = {name: Memory(2**20, 2**20) for name in sides}
    found = row_of("a size", timed, True, {"main": 0.0, "fp32": 1e-7}, memories)
    write_rows(tmp_path / "packing.json", "packing", [found])
    shown = table.page(
        tmp_path, {"packing": table.ROWS["packing"], "rl-elbo": table.ROWS["rl-elbo"]}, {"rl-elbo": "left out"}
    )
    line = "| packing | a size | 4.00 s | 2.00 s, 2.00 (2.00) | 1.00 s, 4.00 (4.00) | 1, 1, 1 | yes, 1e-07 |"
    assert line in shown
    assert "| rl-elbo | left out |" in shown
    assert table.ROWS["step-mini-1k-1view"].needed_bytes(1) == pytest.approx(13 * 2**30, rel=0.2)


def test_a_side_elsewhere_needs_a_checkout_and_tells_when_it_ends(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a checkout of dFactory"):
        Elsewhere("step", {}, tmp_path)
    with Elsewhere("no_such_benchmark", {}) as side, pytest.raises(RuntimeError, match="ended with status 1"):
        side.turn(0)


def test_operations_are_counted_idea_by_idea():
    """Two documents of 3 blocks of 4, one block of prompt, two views: by hand. The last but one line is the batch's own."""
    ids, seen = torch.arange(12), torch.ones(12, dtype=torch.bool)
    document = Document(ids, [(ids, seen & (ids >= 4))] * 2, block_size=4, first_block=1)
    batch = make_batch([[document, document]], row_length=64)
    assert operations.costs_of(batch, block=4, layers=2) == [
        (2 * 2 * 2 * 24, 2 * 2 * 2 * 2 * 16 * 6),
        (2 * 2 * 2 * (12 + 8), 2 * 2 * 2 * 16 * (6 + 5)),
        (2 * 2 * (12 + 16), 2 * 2 * 16 * (6 + 10)),
        (2 * 2 * (8 + 16), 2 * 2 * 16 * (3 + 10)),
        (2 * batch.num_tokens, 2 * operations.visible_pairs(batch).all),
        (batch.num_tokens + 32, operations.visible_pairs(batch).all + 16 * 20),
    ]


def test_our_line_of_the_operations_is_what_the_data_layer_packs(capsys):
    """Without prefixes to share it adds nothing; preference pairs share their prompts."""
    for stage, shares in (("sft", False), ("dpo", True)):
        recipe = load_recipe(DATA.parent / f"{stage}.yaml", ["model_name_or_path=tiny"])
        found = operations.count(recipe, windows=2)
        ways = list(found.ways.values())
        assert (ways[3] == ways[4]) != shares
        assert all(a.positions >= b.positions and a.pairs >= b.pairs for a, b in itertools.pairwise(ways))
    assert operations.main([str(DATA.parent / "sft.yaml"), "--windows", "1"]) == 0
    assert "+ one clean stream for all views" in capsys.readouterr().out
