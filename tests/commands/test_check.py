"""Dry runs: what a good recipe is told, and for each bad one the message and the status."""

import json
import re
import shutil
from pathlib import Path

import pytest

from dfactory.assembly import make_source, read_inputs
from dfactory.cli import main
from dfactory.models.tiny import TINY_DIR
from dfactory.planning.memory import count_parameters
from dfactory.recipe import load_recipe
from tests.commands.conftest import GOLDEN, ROOT, save_plain, write_recipe


def conversation(question: str = "Which day follows Monday?", answer: str = "Tuesday") -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe over the embedded model with these lines of data and keys; the training file is train.jsonl."""

    def write(lines: list[str] | None = None, **keys) -> Path:
        (tmp_path / "train.jsonl").write_text("\n".join(lines or [conversation()] * 30) + "\n")
        base = {
            "model_name_or_path": "tiny",
            "init_weights": "random",
            "dtype": "float32",
            "output_dir": str(tmp_path / "run"),
            "datasets": [{"path": "train.jsonl"}],
            "block_size": 16,
            "max_length": 64,
            "learning_rate": 1e-3,
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(base | keys))
        return file

    return write


@pytest.fixture
def check(capsys):
    """Run `dfactory check`: (status, everything that was printed, in one line)."""

    def run(*words: object) -> tuple[int, str]:
        status = main(["check", *map(str, words)])
        printed = capsys.readouterr()
        return status, " ".join((printed.out + printed.err).split())

    return run


# --- recipes that would start -----------------------------------------------------------------------------------------


def test_a_good_recipe(recipe, check, tmp_path):
    status, told = check(recipe(), "--gpus", 2)
    assert status == 0
    assert "training would start" in told
    assert f"{count_parameters(TINY_DIR).total / 1e6:.2f}M, of which" in told
    assert "<|mask|>, " in told
    assert "<|endoftext|> never decoded" in told
    assert "with generation markers" in told
    assert "30 documents" in told
    seconds = re.search(r"first step about ([\d.]+) s after the command on this CPU, ([\d.]+) s of the processor", told)
    assert all(float(number) > 0 for number in seconds.groups())
    assert not (tmp_path / "run").exists()


def test_the_first_step_tells_how_long_the_start_took(golden_run):
    """What `time to the first step` foretells. benchmarks/LOG.md compares the two."""
    rows = [json.loads(line) for line in (golden_run / "metrics.jsonl").read_text().splitlines()]
    first = rows[0]
    assert first["start_cpu_seconds"] > 0
    assert first["seconds"] < first["start_seconds"]
    assert not any("start_seconds" in row for row in rows[1:])


def test_replaced_tokens_are_shown(recipe, check):
    _, told = check(recipe(edit_share=1.0, num_turns=2))
    view = told.partition("view 1 of 4")[2].partition("its mask ratio")[0]
    assert "⟪" in view
    assert "⟨" not in view  # the fill is visible response as well


def test_the_example_is_readable_without_colours(recipe, check):
    _, told = check(recipe([conversation("Which day follows <|mask|>?")]))  # what a user wrote is no mask
    document = "Whichdayfollows<|mask|>?<|role_end|><role>ASSISTANT</role>⟦Tuesday<|role_end|><|endoftext|>⟧"
    assert document in told.replace(" ", "")
    view = told.partition("view 1 of 2")[2].partition("its mask ratio")[0]
    assert "█" in view
    targets = int(told.partition(", by block; ")[2].split()[0])
    assert view.count("█") == targets


def test_memory_counts_the_targets_of_the_rows(recipe, check):
    """Of a long question and a short answer the last layer keeps little; without the records every position may be one."""
    lines = [conversation(question="Which day follows " + "Monday, and which one " * 8 + "Tuesday?")] * 30
    _, told = check(recipe(lines, max_length=256), "--gpus", 1)
    assert "the last one whole at targets alone" in told
    _, told = check(recipe(lines, max_length=256, datasets=[{"path": "missing.jsonl"}]), "--gpus", 1)
    assert "ZeRO 0" in told
    assert "at targets alone" not in told


@pytest.mark.parametrize("ranks", [1, 3])
def test_steps_are_those_of_training(recipe, check, ranks):
    file = recipe(num_train_epochs=2.5, per_device_train_batch_size=2)
    _, told = check(file, "--gpus", ranks)
    loaded = load_recipe(file)
    steps = make_source(loaded, read_inputs(loaded), rank=0, world_size=ranks).num_windows
    row = told.partition("steps an epoch steps epochs ")[2].split()
    assert row[:2] == [str(ranks), str(2 * ranks)]
    assert int(row[4]) == steps


@pytest.mark.parametrize("ranks", [1, 3])
def test_block_sizes_of_the_run(recipe, check, ranks):
    """A table of the phases, and the steps of training, whose rows change with them."""
    file = recipe(num_train_epochs=12, stage="cpt", block_size_schedule=[[0, 1], [4, 64], [8, 16]])
    status, told = check(file, "--gpus", ranks)
    assert status == 0
    table = told.partition("rows an epoch ")[2].split()
    assert [table[0:2], table[6:8], table[12:14]] == [["0", "1"], ["4", "64"], ["8", "16"]]
    loaded = load_recipe(file)
    steps = make_source(loaded, read_inputs(loaded), rank=0, world_size=ranks).num_windows
    row = told.partition("steps an epoch steps epochs ")[2].split()
    assert int(row[4]) == steps
    assert float(row[5]) == 12

    _, told = check(file, f"max_steps={steps}", "--gpus", ranks)
    row = told.partition("steps an epoch steps epochs ")[2].split()
    assert float(row[5]) == pytest.approx(12, rel=0.25)  # by rows an epoch, as if none waited over a change


@pytest.mark.parametrize(
    "schedule, message",
    [
        ([], "give pairs of first step and block size"),
        ([[0, 1, 2]], "give pairs of first step and block size"),
        ([[1, 4], [2, 16]], "its first step must be 0"),
        ([[0, 4], [5, 8], [5, 16]], "its steps must ascend"),
        ([[0, 16], [5, 4]], "ends with 4, but block_size is 16"),
        ([[0, 0], [5, 16]], "a block has at least 1 token"),
        ([[0, 24], [5, 16]], "24 does not divide max_length 64"),
        ([[0, 1], [90, 16]], "begins its last block size at step 90, but max_steps is 50"),
    ],
)
def test_block_sizes_that_cannot_be(recipe, check, schedule, message):
    status, told = check(recipe(block_size_schedule=schedule, max_steps=50))
    assert status == 2
    assert message in told


def test_pairs_keep_their_block_size(recipe, check):
    status, told = check(recipe(block_size_schedule=[[0, 1], [9, 16]], stage="dpo"))
    assert status == 2
    assert "with stage dpo: only cap, cpt, sft change their block size" in told


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"mask_embedding_noise": 0.1}, "mask_embedding_noise 0.1 with mask_embedding_noise_steps 0: give both"),
        ({"mask_embedding_noise_steps": 9}, "mask_embedding_noise 0 with mask_embedding_noise_steps 9: give both"),
        (
            {"mask_embedding_noise": 0.1, "mask_embedding_noise_steps": 9, "stage": "dpo"},
            "with stage dpo: only cap, cpt, sft",
        ),
        (
            {"mask_embedding_noise": 0.1, "mask_embedding_noise_steps": 9, "edit_share": 0.1},
            "drafts would take the place",
        ),
    ],
)
def test_noise_on_masks_that_cannot_be(recipe, check, keys, message):
    status, told = check(recipe(**keys))
    assert status == 2
    assert message in told


def test_tokenised_records_need_no_tokenizer(check, tmp_path):
    file = write_recipe(tmp_path, GOLDEN, vocabulary=150, mask=158, eos=156)
    status, told = check(file)
    assert status == 0
    assert "every tensor has the name and shape" in told
    assert "tokenizer none" in told
    assert "⟦" in told


@pytest.mark.parametrize("name, total, active", [("mini", "16.26B", "1.43B"), ("flash", "102.89B", "6.15B")])
def test_real_models_without_weights(check, name, total, active):
    """Model and memory are told from config.json; what is missing is told too."""
    status, told = check(ROOT / f"recipes/llada2_{name}/sft.yaml", "--gpus", 8)
    assert status == 1
    assert f"{total}, of which {active} active" in told
    assert "> ZeRO 3 <" in told
    assert "2 x P / n" in told
    assert "holds neither model.safetensors" in told
    assert "jsonl:1 holds text but the model directory has no tokenizer" in told


def test_lora_trains_few_parameters(check, tmp_path):
    base = save_plain(tmp_path / "base", "qwen3", tied=True)
    file = write_recipe(tmp_path, base, 90, 95, 94, use_peft=True, lora_r=8, lora_target_modules=["q_proj"])
    status, told = check(file)
    assert status == 0
    assert f"T trained {2 * 8 * (32 + 4 * 8):,}, " in told  # two layers, r, inputs and outputs of q_proj


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_reinforcement_learning(recipe, check, tmp_path):
    (tmp_path / "reward.py").write_text("def long(prompts, completions, *, target, **columns): ...\n")
    rl = {
        "stage": "rl",
        "max_steps": 3,
        "reward_funcs": ["exact_match", "reward.py:long"],
        "decode": {"max_new_tokens": 32, "temperature": 1.0, "acceptance": "top"},
    }
    line = json.dumps({"prompt": "Which day follows Monday?", "answer": "Tuesday"})
    status, told = check(recipe([line] * 3, **rl))
    assert status == 2, told
    assert "prompts 3, the longest of" in told
    assert "exact_match, weight 1; asks for the columns answer" in told
    assert "8 prompts x 8 rollouts = 64" in told
    assert ":1: reward long asks for the column target, which the row does not have" in told
    status, told = check(recipe([line], **rl | {"reward_funcs": ["nowhere.py:long"]}))
    assert status == 2
    assert "training would not start" in told


def test_warnings(recipe, check):
    status, told = check(recipe(warmup_steps=500, max_length=512, learning_rate=0.5, save_steps=1000))
    assert status == 0
    assert "warmup_steps 500, but the run has" in told
    assert "times the longest document; max_length=" in told
    assert "learning_rate 0.5 is unusual for random weights" in told
    assert "save_steps 1000 is more than" in told
    assert "eval_datasets is empty" in told


def test_a_quiet_recipe_has_no_warnings(check, tmp_path):
    (tmp_path / "held_out.jsonl").write_text('{"input_ids": [1, 2, 3, 4, 5, 156], "prompt_lengths": 4}\n')
    lines = [json.dumps({"input_ids": [*range(first, first + 50), 156], "prompt_lengths": 4}) for first in range(20)]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    quiet = {"block_size": 32, "learning_rate": 1e-5, "max_length": 64, "row_length": 384}
    quiet |= {"eval_datasets": [{"path": "held_out.jsonl"}], "datasets": [{"path": "long.jsonl"}]}
    status, told = check(write_recipe(tmp_path, GOLDEN, vocabulary=150, mask=158, eos=156, **quiet))
    assert status == 0
    assert "warning" not in told


@pytest.mark.parametrize(
    "keys, warning",
    [
        ({"block_size": 64}, "block_size 64 is longer than the longest document"),
        ({"block_size": 64}, "block_size 64 is long for these answers"),
        ({}, "29 of the first 30 documents are exact copies"),
        ({"max_steps": 3000}, "save_steps is null: if a run of 3,000 steps breaks off"),
        ({"max_steps": 3000}, "every document is seen"),
        (
            {"use_peft": True, "init_weights": "pretrained", "learning_rate": 0.01},
            "learning_rate 0.01 is unusual for LoRA",
        ),
        (
            {
                "model_name_or_path": str(ROOT / "recipes/llada2_mini/model"),
                "mask_token_id": 156895,
                "eos_token_id": 156892,
                "init_weights": "pretrained",
            },
            "is more than a GPU of 80 GB holds: deepspeed=recipes/deepspeed/zero3.json takes",
        ),
    ],
)
def test_what_usually_goes_wrong(recipe, check, keys, warning):
    assert warning in check(recipe(**keys), "--gpus", 8)[1]


def test_documents_without_an_end(check, tmp_path):
    _, told = check(write_recipe(tmp_path, GOLDEN, vocabulary=150, mask=158, eos=156))
    assert "20 of the first 20 documents do not end with EOS (156)" in told


@pytest.mark.parametrize(
    "generation, warning",
    [
        (
            "{%- if loop.last -%}{%- generation -%}{{ answer }}{%- endgeneration -%}{%- else -%}{{ answer }}{%- endif -%}",
            "of two assistant turns the chat template marks 1",
        ),
        (
            "{%- generation -%}{{- message['content'] -}}{%- endgeneration -%}",
            "the chat template ends an answer with no special token",
        ),
    ],
)
def test_turns_that_are_not_trained(recipe, check, tmp_path, generation, warning):
    """A template that marks the last answer only, and one whose answers have no end."""
    lines = (ROOT / "dfactory/assets/tiny/chat_template.jinja").read_text().splitlines()
    place = next(number for number, line in enumerate(lines) if "{%- generation -%}" in line)
    lines[place] = "{%- set answer = message['content'] ~ '<|role_end|>' -%}" + generation
    (tmp_path / "other.jinja").write_text("\n".join(lines))
    assert warning in check(recipe(chat_template_path="other.jinja"))[1]


def test_preferences_are_learnt_slower_than_answers(recipe, check, tmp_path):
    """The run that a DPO recipe starts from tells its rate."""
    run = shutil.copytree(TINY_DIR, tmp_path / "sft" / "checkpoint-1").parent
    (run / "LATEST").write_text("checkpoint-1")
    (run / "config.yaml").write_text("stage: sft\nlearning_rate: 1.0e-4\n")
    pair = json.dumps({"prompt": "Which day?", "chosen": "Monday", "rejected": "May"})
    keys = {"model_name_or_path": str(run), "init_weights": "pretrained", "stage": "dpo"}
    assert "learning_rate 0.001 of stage dpo is above the 0.0001 of the run" in check(recipe([pair] * 4, **keys))[1]
    assert "of stage dpo is above" not in check(recipe([pair] * 4, **keys, learning_rate=1e-5))[1]


def test_ratios_that_are_noise(recipe, check):
    line = json.dumps({"prompt": "Which day follows Monday?", "answer": "Tuesday"})
    rl = {"stage": "rl", "max_steps": 3, "reward_funcs": ["exact_match"], "policy_loss": "ebpo", "kl_coef": 0.1}
    rl |= {"ratio_normalisation": "sum", "decode": {"max_new_tokens": 32, "temperature": 1.0, "acceptance": "top"}}
    _, told = check(recipe([line], **rl))
    assert "epsilon 0.2 with ratio_normalisation sum" in told
    assert "kl_estimator k3 with policy_loss ebpo" in told


def test_where_the_ratio_is_1_it_says_that_epsilon_has_no_effect(recipe, check):
    line = json.dumps({"prompt": "Which day follows Monday?", "answer": "Tuesday"})
    rl = {"stage": "rl", "max_steps": 3, "reward_funcs": ["exact_match"]}
    rl |= {"decode": {"max_new_tokens": 32, "temperature": 1.0, "acceptance": "top"}}
    none, ahead, iterated = (
        "epsilon, epsilon_high and ratio_clip have no effect",
        "actors score",
        "clipped to 0.8 and 1.2",
    )
    _, told = check(recipe([line], **rl))
    assert none in told
    assert iterated not in told
    assert ahead not in told
    _, told = check(recipe([line], **rl, max_staleness=1, old_policy="learner"))
    assert none in told
    _, told = check(recipe([line], **rl, max_staleness=1, policy_loss="ebpo"))
    assert iterated in told
    assert ahead in told
    assert none not in told
    _, told = check(recipe([line], **rl, num_iterations=4, max_staleness=2))
    assert iterated in told
    assert "max_staleness 2 with num_iterations 4: weights come every 4 versions" in told


def test_origins_and_what_is_written(recipe, check):
    status, told = check(recipe(save_steps=5, max_steps=20, save_total_limit=2), "--seed", 7, "--gpus", 2)
    assert status == 0
    assert "seed 7 (command line)" in told
    assert "learning_rate 0.001 (recipe)" in told
    assert "weight_decay 0," in told.partition("default")[2]
    assert "4 are written, at most 3 are there at a time" in told
    assert "checkpoint-N/ a directory that transformers loads" in told
    assert "FLOP on each rank" in told


def test_a_leak_is_told(recipe, check):
    _, told = check(recipe(eval_datasets=[{"path": "train.jsonl"}]))
    assert "1 held-out documents are also training documents" in told


def test_a_template_without_markers_is_told(recipe, check, tmp_path):
    text = (ROOT / "dfactory/assets/tiny/chat_template.jinja").read_text()
    bare = text.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert bare != text
    (tmp_path / "bare.jinja").write_text(bare)
    status, told = check(recipe(chat_template_path="bare.jinja"))
    assert status == 0
    assert "without generation markers" in told
    assert "no {% generation %} markers" in told


def test_a_used_output_folder_is_told(check, golden_run):
    file = golden_run.parent / "recipe.yaml"
    status, told = check(file)
    assert status == 2
    assert "holds checkpoint-3 of an earlier run" in told
    status, told = check(file, "overwrite_output_dir=true")
    assert status == 0
    assert "holds 3 checkpoint(s) up to checkpoint-3, and overwrite_output_dir is true: they will be removed" in told
    status, told = check(file, "resume_from_checkpoint=true")
    assert status == 0
    assert f"resumes {golden_run}/checkpoint-3" in told.replace("run/ checkpoint", "run/checkpoint")
    assert "changed since: no key" in told
    status, told = check(file, "resume_from_checkpoint=true", "learning_rate=0.5")
    assert status == 0
    assert "-> 0.5" in told
    status, told = check(file, "resume_from_checkpoint=true", "seed=7")
    assert status == 2
    assert "cannot change seed 42 -> 7" in told


# --- recipes that would not -------------------------------------------------------------------------------------------


def test_missing_model_directory(recipe, check, tmp_path):
    status, told = check(recipe(model_name_or_path=str(tmp_path / "nowhere")))
    assert status == 1
    assert f"model_name_or_path {tmp_path}/nowhere is not a directory" in told
    assert "1 error: training would not start" in told


def test_weights_that_do_not_fit(check, tmp_path):
    model = shutil.copytree(GOLDEN, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 16}))
    status, told = check(write_recipe(tmp_path, model, vocabulary=150, mask=158, eos=156))
    assert status == 1
    assert "tensor model.layers.1.mlp.experts.0.down_proj.weight has shape [64, 32], not [64, 16]" in told
    assert "GPU of a rank" in told  # the rest is told all the same


def test_missing_data_file(recipe, check, tmp_path):
    status, told = check(recipe(datasets=[{"path": "absent.jsonl"}]))
    assert status == 1
    assert f"{tmp_path}/absent.jsonl" in told
    assert "GPU of a rank" in told


def test_bad_row(recipe, check, tmp_path):
    lines = [conversation(), conversation(), '{"messages": "oops"}', conversation(), "{"]
    status, told = check(recipe(lines))
    assert status == 1
    assert f"error: {tmp_path}/train.jsonl:3: " in told
    assert f"first {tmp_path}/train.jsonl:5" in told  # the other one is counted too
    assert "3 documents" in told
    status, told = check(recipe(lines, on_bad_row="skip", max_bad_fraction=0.5))
    assert status == 0
    assert f"first {tmp_path}/train.jsonl:3" in told


def test_mask_outside_the_vocabulary(recipe, check):
    status, told = check(recipe(mask_token_id=2048))
    assert status == 2
    assert "mask_token_id 2048 is no token of the model: it must be below the model's vocabulary size 2048" in told


def test_prompt_longer_than_max_length(recipe, check, tmp_path):
    status, told = check(recipe([conversation(), conversation("Why? " * 100)]))
    assert status == 1
    assert f"{tmp_path}/train.jsonl:2: " in told
    assert "max_length is 64" in told


def test_block_size_that_does_not_divide(recipe, check):
    status, told = check(recipe(block_size=24))
    assert status == 2
    assert "block_size 24 does not divide max_length 64" in told


def test_nothing_to_resume_from(recipe, check, tmp_path):
    status, told = check(recipe(resume_from_checkpoint=True))
    assert status == 1
    assert f"no whole checkpoint: {tmp_path}/run holds no checkpoint-N" in told


def test_broken_deepspeed_file(recipe, check, tmp_path):
    (tmp_path / "ds.json").write_text("{\n  oops\n}")
    status, told = check(recipe(deepspeed="ds.json"))
    assert status == 2
    assert f"deepspeed {tmp_path}/ds.json:2 is not JSON" in told


def test_output_that_cannot_be_written(recipe, check, tmp_path):
    (tmp_path / "file").write_text("")
    status, told = check(recipe(output_dir=str(tmp_path / "file" / "run")))
    assert status == 2
    assert "output_dir" in told


def test_no_ranks(recipe, check):
    status, told = check(recipe(), "--gpus", 0)
    assert status == 2
    assert "--gpus 0" in told
