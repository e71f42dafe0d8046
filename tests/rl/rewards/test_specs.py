"""Names, weights and options of rewards; every mistake is named before anything runs."""

import subprocess
import sys

import pytest

from dfactory.errors import ConfigError
from dfactory.rl.rewards.base import REWARDS
from dfactory.rl.rewards.pool import RewardGroup, RewardPool
from dfactory.rl.rewards.specs import RewardSpec, load_reward, parse_rewards, required_columns


@pytest.fixture
def reward_file(tmp_path):
    source = "def polite(prompts, completions, *, word='please', **columns):\n"
    source += "    return [float(word in c) for c in completions]\nnumber = 3\n"
    (tmp_path / "mine.py").write_text(source)
    return tmp_path


def test_entries_of_every_kind(reward_file):
    specs = parse_rewards(
        [
            "exact_match",
            {"name": "length_shaping", "weight": 0.5, "max_length": 9, "cache": 3},
            "trl.rewards.think_format_reward",
            {"name": "mine.py:polite", "word": "thanks"},
            "mine.py:polite",
        ],
        base=reward_file,
    )
    file = f"{reward_file}/mine.py:polite"
    assert specs == [
        RewardSpec("exact_match", "exact_match"),
        RewardSpec("length_shaping", "length_shaping", 0.5, {"max_length": 9, "cache": 3}),
        RewardSpec("think_format_reward", "trl.rewards.think_format_reward"),
        RewardSpec("polite", file, 1.0, {"word": "thanks"}),
        RewardSpec("polite_2", file),
    ]
    functions = [load_reward(spec) for spec in specs]
    assert functions[3](prompts=[""], completions=["thanks a lot"], answer=["x"]) == [1]
    assert functions[4](prompts=[""], completions=["thanks a lot"]) == [0]
    think = [[{"role": "assistant", "content": "<think>x</think>y"}]]
    assert functions[2](prompts=[""], completions=think) == [1]


def test_weights_stand_in_the_entries_or_beside_them():
    assert [s.weight for s in parse_rewards(["exact_match", "tokens_per_forward"], [2, 0.5])] == [2, 0.5]
    with pytest.raises(ConfigError, match="3 numbers for 1 reward_funcs"):
        parse_rewards(["exact_match"], [1, 2, 3])
    with pytest.raises(ConfigError, match="give one of the two"):
        parse_rewards([{"name": "exact_match", "weight": 2}], [1])
    with pytest.raises(ConfigError, match="weight 'big' is not a number"):
        parse_rewards([{"name": "exact_match", "weight": "big"}])


@pytest.mark.parametrize(
    "entry, message",
    [
        ("exact_macth", "did you mean exact_match"),
        ("nonsense", "builtin are"),
        ({"weight": 1}, "name None is not text"),
        ("gone.py:polite", "does not exist"),
        ("mine.txt:polite", "named as path/to/file.py:function"),
    ],
)
def test_mistakes_seen_before_anything_is_imported(reward_file, entry, message):
    with pytest.raises(ConfigError, match=message):
        parse_rewards([entry], base=reward_file)


@pytest.mark.parametrize(
    "entry, message",
    [
        ("mine.py:polit", "did you mean polite"),
        ("mine.py:number", "is a int"),
        ({"name": "mine.py:polite", "wrod": "x"}, "did you mean word"),
        ({"name": "exact_match", "lower": True}, "has no option lower: it takes answer"),
        ("no_such_package.reward", "no_such_package"),
        ("trl.rewards.no_such_reward", "no_such_reward"),
    ],
)
def test_mistakes_seen_on_loading(reward_file, entry, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(*parse_rewards([entry], base=reward_file))


def test_code_runs_only_if_the_recipe_allows_it():
    with pytest.raises(ConfigError, match="allow_code_execution: true"):
        parse_rewards(["code_tests"])
    assert parse_rewards(["code_tests"], allow_code_execution=True)[0].target == "code_tests"
    with pytest.raises(ConfigError, match="reward_funcs is empty"):
        parse_rewards([])


def test_columns_that_a_reward_needs():
    def needed(*entry):
        return required_columns(load_reward(*parse_rewards(entry)))

    assert needed("exact_match") == ["answer"]
    assert needed("format_regex") == ["pattern"]
    assert needed({"name": "format_regex", "pattern": ".*"}) == []
    assert needed("tokens_per_forward") == []
    assert needed("trl.rewards.accuracy_reward") == ["solution"]


def test_rewards_do_not_import_torch():
    specs = parse_rewards(REWARDS.names, allow_code_execution=True)
    code = "import sys\nfrom dfactory.rl.rewards.specs import *\n"
    code += f"for s in {specs!r}: load_reward(s)\nassert not {{'torch', 'ray', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


PICKY = """
def few(completions):
    return [1.0 for _ in completions]

def counted(prompts, completions, answer, log_metric):
    log_metric("asked", len(answer))
    return [float(a) for a in answer]

def placed(completions, /, **columns):
    return [1.0 for _ in completions]
"""


def test_a_function_gets_what_it_names(tmp_path):
    """Without **columns too, which TRL demands."""
    (tmp_path / "picky.py").write_text(PICKY)
    specs = parse_rewards(["picky.py:few", "picky.py:counted"], base=tmp_path)
    per = {"completion_ids": [[1], [1]], "forwards": [5, 5]}
    with RewardPool(specs, workers=1) as pool:
        result = pool.score([RewardGroup("p", ["a", "b"], {"answer": 2, "task": "t"}, per)])[0]
    assert result.reward_G == [3, 3], result.functions
    with pytest.raises(ConfigError, match="takes completions by its place only"):
        load_reward(*parse_rewards(["picky.py:placed"], base=tmp_path))


ROWS = [
    ("exact_match", {"answer": "4"}, {"answer": None}, "answer None is neither text nor a number"),
    ("exact_match", {"answer": 4}, {"answers": 4}, "asks for the column answer, which the row does not have"),
    ("math_verify", {"answer": 0.5}, {"answer": ["4"]}, r"answer \['4'\] is neither"),
    ("format_regex", {"pattern": "a+"}, {"pattern": "(a"}, r"pattern '\(a' is no regular expression"),
    ({"name": "format_regex", "pattern": ".*"}, {}, None, None),
    ("code_tests", {"tests": ["assert f(1) == 1"]}, {"tests": ["f(1)"]}, "is not of the form"),
    ("code_tests", {"tests": ["assert f(1) == 1"]}, {"tests": []}, "is no list with at least one test"),
]


@pytest.mark.parametrize("entry, good, bad, message", ROWS, ids=range(len(ROWS)))
def test_a_row_that_a_reward_cannot_score_is_found_before_the_run(entry, good, bad, message):
    specs = parse_rewards([entry], allow_code_execution=True)
    RewardPool(specs, workers=1, rows=[("a.jsonl:1", good)]).close()
    if bad is not None:
        with pytest.raises(ConfigError, match=rf"^a.jsonl:2: .*{message}"):
            RewardPool(specs, workers=1, rows=[("a.jsonl:1", good), ("a.jsonl:2", bad)])


def test_an_option_that_cannot_work_is_found_on_loading():
    with pytest.raises(ConfigError, match="isolation 'jail'"):
        load_reward(*parse_rewards([{"name": "code_tests", "isolation": "jail"}], allow_code_execution=True))
