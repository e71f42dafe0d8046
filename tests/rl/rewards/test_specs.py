"""Names, weights and options of rewards; every mistake is named before anything runs."""

import subprocess
import sys

import pytest

from dfactory.errors import ConfigError
from dfactory.rl.rewards.specs import BUILTINS, RewardSpec, load_reward, parse_rewards, required_columns


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
    specs = parse_rewards(BUILTINS, allow_code_execution=True)
    code = "import sys\nfrom dfactory.rl.rewards.specs import *\n"
    code += f"for s in {specs!r}: load_reward(s)\nassert not {{'torch', 'ray', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
