"""Reports of a real run and of written metrics: pictures that are pictures, a page that needs nothing beside it."""

import base64
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from dfactory.cli import main
from dfactory.commands.report import write_chain, write_report
from dfactory.commands.reporting.chain import read_chain
from dfactory.commands.reporting.figures import drawings, from_zero, smooth
from dfactory.commands.reporting.memory import forecast_of
from dfactory.commands.reporting.page import final_numbers
from dfactory.commands.reporting.runs import read_run, sweep_file
from dfactory.commands.reporting.tradeoff import draw_tradeoff
from dfactory.errors import DataError
from dfactory.planning.memory import count_parameters
from dfactory.runs.lineage import Base, Lineage, Source, Training

PICTURES = {"memory.png", "loss.png", "loss_by_t.png", "hit_rate.png", "optimiser.png", "phases.png", "speed.png"}


def write_run(folder: Path, rows: list[dict], config: str = "learning_rate: 0.1\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(config)
    return folder


def test_a_report_that_cannot_be_written_is_named(tmp_path, capsys):
    """As on a full or read-only disk; a file stands where its folder would."""
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    (run / "report").touch()
    assert main(["report", str(run)]) == 1
    assert f"{run / 'report'} could not be written" in capsys.readouterr().err


def test_a_real_run(golden_run, capsys):
    assert main(["report", str(golden_run)]) == 0
    page = (golden_run / "report" / "report.html").read_text()
    assert {file.name for file in (golden_run / "report").glob("*.png")} == PICTURES
    assert "report.html and 7 pictures" in capsys.readouterr().out
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert [data[:8] for data in pictures] == [b"\x89PNG\r\n\x1a\n"] * 7
    assert "://" not in page.replace(str(golden_run), "")  # nothing is fetched
    assert "learning_rate: 0.01" in page
    assert "<td>steps</td><td>3</td>" in page
    last = json.loads((golden_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"<td>held-out loss</td><td>{last['eval/loss']:.4f}</td>" in page


def test_several_runs_go_into_the_first(tmp_path):
    runs = [write_run(tmp_path / name, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]) for name in ("a", "b")]
    page = write_report(runs).read_text()
    assert "<th>a</th><th>b</th>" in page
    assert not (tmp_path / "b" / "report").exists()
    assert [file.name for file in (tmp_path / "a" / "report").glob("*.png")] == [
        "loss.png"
    ]  # nothing else was measured


def test_what_was_decoded_during_training(tmp_path):
    """Metrics of held-out prompts only: drawn, and the last one in the table."""
    rows = [{"step": 1, "loss": 2.0, "confidence": 0.5}]
    rows += [{"step": s, "eval/tokens_per_forward": s / 2, "eval/exact_match": 0.25} for s in (1, 5)]
    page = write_report([write_run(tmp_path / "run", rows)])
    assert {file.name for file in page.parent.glob("*.png")} == {"loss.png", "decoding.png", "confidence.png"}
    assert "<td>tokens per forward</td><td>2.5000</td>" in page.read_text()
    assert "<td>exact match</td><td>0.2500</td>" in page.read_text()


def test_runs_of_one_name_are_told_apart_by_path(tmp_path):
    runs = [write_run(tmp_path / name / "run", [{"step": 1, "loss": 2.0}]) for name in ("a", "b")]
    assert f"<th>{runs[1]}</th>" in write_report(runs).read_text()


def test_a_recipe_cannot_inject_markup(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 2.0}], config="name: <script>x</script>\n")
    page = write_report([run]).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_final_numbers(tmp_path):
    """Means of the last tenth for training, the last evaluation, sums of what adds up."""
    rows = [
        {"step": s, "loss": float(s), "tokens": 100, "seconds": 2.0, "tokens_per_second": 50.0, "mfu": 0.25}
        for s in range(1, 21)
    ]
    rows[-1] |= {"seconds/forward": 1.0, "seconds/backward": 3.0}
    rows.append({"step": 20, "eval/loss": 7.5, "eval/loss_t0.10": 3.0})
    numbers = final_numbers(read_run(write_run(tmp_path / "run", rows), "run"))
    assert numbers == {
        "stage": "sft",
        "steps": "20",
        "training loss": "19.5000",
        "held-out loss": "7.5000",
        "tokens": "2,000",
        "seconds": "40",
        "time by phase": "backward 75%, forward 25%",
        "tokens per second (median)": "50",
        "model FLOPs utilisation (median)": "25.0%",
    }


def test_powers_of_ten_are_numbers_although_formulae_are_off(tmp_path):
    rows = [{"step": step, "loss": 10.0 ** (2 - step)} for step in range(1, 6)]
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = drawings()["loss"]([read_run(write_run(tmp_path / "r", rows), "r")])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "0.1" in labels
    assert not any("$" in label for label in labels)


@pytest.mark.parametrize("evaluations", [2, 8])
def test_the_legend_of_mask_ratios_covers_no_curve(evaluations, tmp_path):
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    rows = [
        {"step": 50 * step} | {f"eval/loss_t{t}": t + 0.2 / (1 + step) for t in levels}
        for step in range(1, 1 + evaluations)
    ]
    run = read_run(write_run(tmp_path / "r", [{"step": 1, "loss": 1.0}, *rows]), "r")
    figure = drawings()["loss_by_t"]([run])
    figure.savefig(tmp_path / "figure.png")
    (axes,) = figure.axes
    legend = axes.get_legend().get_window_extent()
    assert len(axes.get_legend().get_texts()) == len(levels)
    assert not any(
        legend.contains(*point) for line in axes.lines for point in axes.transData.transform(line.get_xydata())
    )
    assert not legend.overlaps(axes.patch.get_window_extent())
    assert legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("low, high", [(0, 0), (0, 5), (2, 5), (-20, -3), (-2, 1)])
def test_an_axis_from_zero_holds_zero_and_all_values(low, high):
    """Also where rewards are below zero; upright, with room at both ends."""
    bottom, top = from_zero(low, high)
    assert bottom < min(low, 0) <= max(high, 0) < top


def test_smoothing_keeps_constants_and_ends():
    assert smooth(np.ones(10)) is None
    np.testing.assert_allclose(smooth(np.ones(400)), 1.0)
    line = np.arange(400.0)
    np.testing.assert_allclose(smooth(line)[10:-10], line[10:-10])


def test_a_line_that_is_being_written_is_ignored(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 2.0}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert "<td>steps</td><td>1</td>" in write_report([run]).read_text()


def test_missing_empty_and_broken_metrics(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path}/metrics.jsonl does not exist" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds no step yet"):
        write_report([write_run(tmp_path / "empty", [])])
    broken = write_run(tmp_path / "broken", [])
    (broken / "metrics.jsonl").write_text('{"step": 1}\n{"step":\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not JSON"):
        write_report([broken])
    assert not (broken / "report").exists()


# --- several stages, sweeps, completions, memory ----------------------------------------------------------------------


def sweep(folder: Path, name: str, points: list[tuple[float, float, float]]) -> None:
    rows = [{"threshold": t, "exact_match": e, "tokens_per_forward": f} for t, e, f in points]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_pipeline_of_stages(tmp_path):
    """Each stage has its own axes; a sweep before and one after; a report beside the runs."""
    rows = [{"step": step, "loss": 2.0 / step, "eval/loss_t0.50": 1.0 / step} for step in (1, 2, 3)]
    runs = [write_run(tmp_path / stage, rows, config=f"stage: {stage}\n") for stage in ("sft", "cap")]
    sweep(runs[0], "thresholds.jsonl", [(0.9, 0.7, 3.0), (0.5, 0.6, 4.0)])
    sweep(runs[1], "thresholds_after.jsonl", [(0.9, 0.7, 4.0), (0.5, 0.68, 5.0)])
    assert [list(read_run(run, run.name).sweeps()) for run in runs] == [["sft"], ["cap after"]]
    assert [row["threshold"] for row in read_run(runs[0], "sft").sweeps()["sft"]] == [0.5, 0.9]
    words = ["report", *map(str, runs), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {"loss.png", "loss_by_t.png", "tradeoff.png"}
    assert not (runs[0] / "report").exists()
    loss = drawings()["loss"]([read_run(run, run.name) for run in runs])
    assert [axes.get_title(loc="left") for axes in loss.axes] == ["loss: sft", "loss: cap"]
    lines = [line for axes in draw_tradeoff([read_run(run, run.name) for run in runs]).axes for line in axes.lines]
    assert [line.get_label() for line in lines] == ["sft", "cap after"]
    assert list(lines[0].get_xdata()) == [4.0, 3.0]


def test_sweeps_over_other_keys_are_drawn_beside_thresholds(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 2.0}])
    sweep(run, "thresholds.jsonl", [(0.9, 0.7, 3.0)])
    rows = [{"swept": "entropy_bound", "entropy_bound": b, "exact_match": 0.6, "tokens_per_forward": b} for b in (2, 1)]
    (run / sweep_file("entropy_bound")).write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"swept": "acceptance", "acceptance": by, "exact_match": 0.5, "tokens_per_forward": 1}
        for by in ("top", "sampled")
    ]
    (run / sweep_file("acceptance")).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (axes,) = draw_tradeoff([read_run(run, "run")]).axes
    assert [line.get_label() for line in axes.lines] == ["run acceptance", "run entropy_bound", "run"]
    assert [text.get_text() for text in axes.texts] == ["top", "sampled", "1", "2", "0.9"]
    assert "acceptance and entropy_bound and threshold" in axes.get_title(loc="left")


def test_completions_are_shown(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 0.0, "reward": 0.5}], config="stage: rl\n")
    prompt = [{"role": "user", "content": "Say <b>"}]
    rows = [{"step": s, "group": s, "prompt": prompt, "completion": f"answer {s}", "reward": s / 20} for s in range(20)]
    (run / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([run]).read_text()
    shown = [s for s in range(20) if f"<td>answer {s}</td>" in page]
    assert shown == [0, 1, 2, 3, 16, 17, 18, 19]
    assert "Say &lt;b&gt;" in page
    assert "<td>reward</td><td>0.5000</td>" in page


# --- a chain -----------------------------------------------------------------------------------------------------------


def write_chain_of_runs(folder: Path) -> list[Path]:
    """Four stages, each from the one before, by an absolute path, a relative one or a checkpoint."""
    eight = range(1, 21)
    rows = {
        "sft": [{"step": s, "loss": 4.0 / s, "tokens": 100, "seconds": 60.0} for s in eight],
        "cap": [{"step": s, "loss": 1.0, "confidence": 1 / s} for s in eight],
        "dpo": [{"step": s, "loss": 0.7, "rewards/accuracies": s / 20} for s in eight],
        "rl": [{"step": s, "loss": 0.0, "reward": s / 20, "unique_fraction": 0.5} for s in eight],
    }
    for name in ("sft", "cap"):
        rows[name] += [{"step": s, "eval/loss": 2.0 / s, "eval/exact_match": s / 40} for s in (10, 20)]
    rows["dpo"] += [{"step": 20, "eval/rewards/accuracies": 0.8}]
    before = {"sft": "tiny", "cap": str(folder / "sft"), "dpo": "cap/checkpoint-20", "rl": str(folder / "dpo")}
    runs = {
        name: write_run(folder / name, lines, f"stage: {name}\nmodel_name_or_path: {before[name]}\n")
        for name, lines in rows.items()
    }
    (folder / "cap/checkpoint-20").mkdir()
    line = {"step": 1, "group": 0, "prompt": "Say <b>", "completion": "<i>no</i>", "reward": 0.25}
    (runs["rl"] / "completions.jsonl").write_text(json.dumps(line) + "\n")
    previews = [{"step": s, "prompt": "Q", "expected": "A", "answered": f"at {s}", "right": s > 10} for s in (10, 20)]
    (runs["sft"] / "previews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in previews))
    return list(runs.values())


def test_a_chain_is_followed_back_and_drawn_in_its_order(tmp_path, capsys):
    runs = write_chain_of_runs(tmp_path)
    assert main(["report", "--chain", str(runs[-1]), "--output", str(tmp_path / "out")]) == 0
    assert "chain.html" in capsys.readouterr().out
    page = (tmp_path / "out/chain.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["1. sft", "2. cap", "3. dpo", "4. rl"]
    assert [link.source for link in read_chain(runs[-1:]).links] == ["tiny", "sft", "cap/checkpoint-20", "dpo"]
    assert [link.run.label for link in read_chain([runs[1], runs[3], runs[0]]).links] == ["sft", "cap", "dpo", "rl"]
    shown = [re.findall('alt="([^"]*)"', section) for section in page.split("<section ")[1:]]
    assert shown == [
        ["loss", "exact match"],
        ["loss", "entropy of correct predictions", "exact match"],
        ["chosen above rejected", "loss"],
        ["mean reward of the rollouts", "different answers in a group"],
    ]
    assert "<small>held-out loss</small> 0.200 \N{RIGHTWARDS ARROW} <b>0.100</b>" in page
    assert "<small>held-out chosen above rejected</small> <b>80.0%</b>" in page  # of one evaluation
    assert "<small>reward</small> 0.075 \N{RIGHTWARDS ARROW} <b>0.975</b>" in page
    assert '<td data-label="time of the steps">20.0 min</td>' in page
    assert '<span class="wrong">at 10</span>' in page
    assert '<span class="right">at 20</span>' in page
    assert "&lt;i&gt;no&lt;/i&gt;" in page
    assert "<i>no" not in page
    assert "://" not in page.replace(str(tmp_path), "")


def test_evaluations_of_a_chain_stand_below_each_other(tmp_path):
    """Those with the same questions and decode keys are one table; their commands are told."""
    runs = write_chain_of_runs(tmp_path)
    for run, share in zip(runs, (0.5, 0.75), strict=False):
        result = {"metric": "exact_match", "value": share, "low": 0.4, "high": 0.8, "records": 8}
        one = {"step": 20, "date": "2026-01-02", "command": f"dfactory eval --model {run.name}", "data": "q.jsonl"}
        (run / "evaluations.jsonl").write_text(json.dumps(one | {"decode": {"rule": "x"}, "results": [result]}) + "\n")
    page = write_chain(runs[-1:]).read_text()
    assert page.count("<h3>dfactory eval: q.jsonl</h3>") == 1
    assert page.index("<b>50.0%</b>") < page.index("<b>75.0%</b> <small>40.0% to 80.0%</small>")
    assert "2026-01-02  dfactory eval --model cap" in page


def test_stages_without_a_folder_are_known_by_their_record(tmp_path):
    """As after an export; a run that leads back to itself ends the search."""
    run = write_run(tmp_path / "rl", [{"step": 1, "loss": 1.0}], f"stage: rl\nmodel_name_or_path: {tmp_path / 'rl'}\n")
    first, last = (Training(name, f"run_{name}", Source("x"), "", 7, tokens=70) for name in ("sft", "rl"))
    state = run / "checkpoint-1/engine/state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    (run / "checkpoint-1/dfactory.json").write_text(Lineage(Base("hub", "org/name"), (first, last)).text())
    page = write_chain([run]).read_text()
    assert "sft <small>run_sft, by its record</small>" in page
    assert "from org/name" in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["1. rl"]


def test_memory_is_measured_and_forecast(golden_run):
    run = read_run(golden_run, "run")
    assert run.curve("peak_rss")[1].max() > 0
    assert set(run.curve("ranks")[1]) == {1}
    expected = forecast_of(run)
    assert expected > 4 * 4 * count_parameters(golden_run / "checkpoint-3").total  # weights, gradients, two moments
    moved = run._replace(config=run.config.replace("model_name_or_path: /", "model_name_or_path: /nowhere/"))
    assert forecast_of(moved) is None


def test_names_and_texts_of_a_stranger_stay_text(tmp_path):
    """Markup in a folder's name, a recipe, a metric or a completion; and what matplotlib would read as a formula."""
    evil = "<script>alert(1)</script>"
    rows = [{"step": step, "loss": 1.0, f"seconds/{evil}": 1.0, evil: 2.0} for step in (1, 2)]
    run = write_run(tmp_path / "<b onload=x>$\\frac{", rows, f"stage: '{evil}'\nrun_name: '{evil}'\n")
    line = {"step": 1, "group": 0, "prompt": evil, "completion": evil, "reward": evil}
    (run / "completions.jsonl").write_text(json.dumps(line) + "\n")
    page = write_report([run, write_run(tmp_path / "other", rows)]).read_text()  # of two, legends have names
    assert "<script" not in page
    assert "<b onload" not in page
    assert page.count("&lt;script&gt;") >= 5
