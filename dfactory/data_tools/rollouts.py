"""Decoded answers with their traces and a reward's verdict: records of trajectory training.

    dfactory data rollouts --model DIR --input PROMPTS.jsonl --output TRACES.jsonl --reward exact_match \\
        --num-generations 4 decode.temperature=1.0 decode.threshold=0.9

A line is what `dfactory generate --keep-trace` writes, with `reward`, and `correct`: whether the reward is at least
--correct-from. Trajectory training (`view_source: trace`) reads it, and leaves out what is not correct (`trace_filter`). An
answer that could not be scored is left out.
"""

from dfactory.commands.generate import output_of, trace_of
from dfactory.data_tools.command import parser_of, say, split_overrides
from dfactory.data_tools.files import writing
from dfactory.data_tools.sampling import add_arguments, sample
from dfactory.decoding.keys import load_decode_keys


def main(words: list[str] | None = None) -> int:
    parser = parser_of("rollouts", epilog="further words: decode.key=value ...")
    add_arguments(parser, generations=1)
    parser.add_argument(
        "--correct-from",
        type=float,
        default=1.0,
        help="the reward from which an answer is correct (default: %(default)s)",
    )
    options, overrides = split_overrides(parser, words)

    written = correct = unscored = 0
    with writing(options.output) as write:
        for group in sample(options, load_decode_keys(overrides)):
            for answer, reward in zip(group.answers, group.rewards, strict=True):
                if reward is None:
                    unscored += 1
                    continue
                output = output_of(group.row, answer)
                verdict = {"reward": reward, "correct": reward >= options.correct_from}
                write(output | trace_of(output, answer) | verdict)
                written, correct = written + 1, correct + verdict["correct"]
    say(f"{written:,} traces, {correct:,} correct, {unscored:,} unscored and left out: {options.output}")
    return 0
