"""reasoning-gym's own scorer of the row's task.

Rows are what reasoning-gym yields: `question`, `answer`, `metadata` as columns, or all of it under `entry`. The task's
name stands in the column `task`, else in metadata.source_dataset.

Some of its scorers evaluate the response as Python (`eval`, or sympy's `parse_expr`, which is `eval` too). The model's
text gets there only as a literal, or as arithmetic with elementary functions; anything else is scored as no answer.
"""

import ast
import functools
import re

from dfactory.data.answers import compiled_pattern
from dfactory.rl.rewards.base import REWARDS, Reward
from dfactory.rl.rewards.deadline import within
from dfactory.rl.rewards.text import captured_text

EVALUATE_LITERALS = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
EVALUATE_EXPRESSIONS = {
    *("countdown", "puzzle24", "polynomial_multiplication"),
    *("simple_integration", "intermediate_integration"),
}
ELEMENTARY = "sin|cos|tan|sec|csc|cot|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|Abs|abs"
EXPRESSION = re.compile(
    rf"""(?: (?:{ELEMENTARY})\s*(?=\()           # a call of an elementary function
           | [A-Za-z]\w*(?!\w|\s*\()           # a name that is not called
           | \d++(?:\.\d*)? | \.\d++
           | [-+*/^(),!=\s]
         )*+""",  # possessive: no text makes it try twice
    re.VERBOSE,
)
CALL_OF_A_VALUE = re.compile(r"\)\s*\(")
PATTERN = "reward reasoning_gym: answer_pattern"
LONGEST_EXPRESSION = 1000
LONGEST_LITERAL = 20_000  # the parser takes a thousand times its memory


def reasoning_gym(
    prompts,
    completions,
    *,
    task: list[str] | None = None,
    entry: list[dict] | None = None,
    question: list[str] | None = None,
    answer: list[str] | None = None,
    metadata: list[dict] | None = None,
    answer_tag: str | None = None,
    answer_pattern: str | None = None,
    timeout_s: float = 5.0,
    **columns,
) -> list[float]:
    """The score of the task's scorer, mostly in 0 .. 1. `answer_tag`: score only the text in <tag> .. </tag>.
    `answer_pattern`: score only the first group of its last match, where it matches.

    A response on which the scorer fails, or takes more than `timeout_s` of CPU time, scores 0.
    """
    count = len(completions)
    if entry is None:
        flat = zip(question or [None] * count, answer or [None] * count, metadata or [None] * count, strict=True)
        entry = [dict(zip(("question", "answer", "metadata"), values, strict=True)) for values in flat]
    names = task or [row["metadata"]["source_dataset"] for row in entry]
    pattern = compiled_pattern(answer_pattern, PATTERN)
    texts = [captured_text(completion, pattern, timeout_s) for completion in completions]
    if answer_tag is not None:
        texts = [text and tagged(text, answer_tag) for text in texts]
    rows = zip(names, texts, entry, strict=True)
    return [within(timeout_s, score, name, text, row, late=0.0) for name, text, row in rows]


def tagged(text: str, tag: str) -> str | None:
    """The text in the last <tag> .. </tag>. reasoning-gym's own search takes a time that is quadratic in open tags."""
    found, begin, end = None, f"<{tag}>", f"</{tag}>"
    place = text.find(begin)
    while place >= 0 and (close := text.find(end, place)) >= 0:
        found = text[place + len(begin) : close].strip()
        place = text.find(begin, close)
    return found


def score(task: str, text: str | None, entry: dict) -> float:
    if text is None or not may_be_scored(task, text):
        return 0.0
    score_answer = scorer(task)
    try:
        return float(score_answer(text, entry))
    except Exception:  # of a scorer that cannot read the response, or of a row that it cannot read
        score_answer(str(entry["answer"]), entry)
        return 0.0


@functools.cache
def scorer(task: str):
    """The scorer by name; an unknown name is a ValueError of reasoning-gym."""
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


def may_be_scored(task: str, text: str) -> bool:
    """False where scoring would run code that the model wrote."""
    if task in EVALUATE_LITERALS:
        return is_literal_or_no_python(text)
    if task in EVALUATE_EXPRESSIONS:
        return is_arithmetic(text)
    return True


def is_literal_or_no_python(text: str) -> bool:
    """Text on which `eval` yields a literal or fails before it runs anything."""
    if len(text) > LONGEST_LITERAL:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
        ast.literal_eval(tree)
    except SyntaxError:
        return True
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


def is_arithmetic(text: str) -> bool:
    """Numbers, names, operators, and calls of elementary functions only."""
    return len(text) <= LONGEST_EXPRESSION and bool(EXPRESSION.fullmatch(text)) and not CALL_OF_A_VALUE.search(text)


def prepare(answer_pattern: str | None = None, **options) -> None:
    """Refuse a wrong pattern before the run starts."""
    compiled_pattern(answer_pattern, PATTERN)


reasoning_gym.prepare = prepare
REWARDS.add(Reward(reasoning_gym, per_rollout=True, requires=("reasoning_gym",)))
