"""Keys of the decoder: `decode.threshold=0.9` on the command line, `decode:` in a recipe; and the rules between them."""

import math
from dataclasses import dataclass
from typing import Optional

from dfactory.config.keys import key

STEP_SCHEDULES = ("even", "ascending")


@dataclass
class DecodeKeys:
    block_size: Optional[int] = key(
        None, "tokens denoised together; null: as the model was trained, else 32; in a recipe, its block_size", low=1
    )
    max_new_tokens: int = key(512, "longest response, EOS included", low=1)
    threshold: float = key(0.95, "commit a masked position when its confidence exceeds this", low=0.0, high=1.0)
    min_commit: int = key(1, "commit at least so many a forward, the most confident first", low=1)
    steps: Optional[int] = key(
        None,
        "forwards in which a block loses its masks, shared out by step_schedule; takes the place of min_commit. threshold "
        "1.0: exactly so many; lower: positions above it are committed as well, so fewer. null: min_commit decides",
        low=1,
    )
    step_schedule: str = key(
        "even",
        "the least that each of a block's steps commits. even: the same, what is left over with the first; ascending: "
        "twice as much each time as far as whole tokens allow (32 in 6 steps: 1 1 2 4 8 16); both add up to the block's "
        "masks",
        choices=STEP_SCHEDULES,
    )
    eos_penalty: float = key(
        0.0,
        "multiply the confidence of EOS by a factor that rises linearly over the forwards of a block, from 1 - eos_penalty "
        "at the first to 1 at the last and wherever no mask is left. The last is the one numbered steps, else "
        "ceil(block_size / min_commit), although a block may need fewer. EOS means the token whose probability acceptance "
        "compares, or which an edit writes. What is drawn and its log-probability stay as they are; 0.0: off",
        low=0.0,
        high=1.0,
    )
    editing_threshold: Optional[float] = key(
        None,
        "replace a visible response token when the probability of the one drawn exceeds this (acceptance top: never the "
        "most probable one); null: off; 0.0: whenever another one is drawn",
        low=0.0,
        high=1.0,
    )
    max_post_steps: int = key(16, "forwards that a block without masks may go on editing", low=0)
    temperature: float = key(0.0, "0: greedy", low=0.0)
    top_k: Optional[int] = key(None, "sample among the k most likely", low=1)
    top_p: Optional[float] = key(None, "sample among the most likely that hold this mass", low=0.0, high=1.0)
    acceptance: str = key(
        "sampled",
        "compare the sampled token's own probability, or the top probability (keeps the distribution)",
        choices=("sampled", "top"),
    )
    suppress_special: bool = key(
        True, "never emit the mask and other special tokens, EOS apart; false: as LLaDA2's own code"
    )
    cuda_graphs: bool = key(
        False,
        "denoising forwards of few fixed shapes, which a GPU replays instead of launching thousands of kernels from "
        "Python; needs 16 bits there; on a CPU the shapes alone",
    )
    batch_size: int = key(32, "slots decoded together; a finished response frees its slot", low=1)
    seed: int = key(0, "of the sampling, per prompt", low=0, high=2**63 - 1)
    mask_token_id: Optional[int] = key(None, "null: ask the tokenizer")
    eos_token_id: Optional[int] = key(None, "null: ask the tokenizer")


def most_steps(block_size: int, min_commit: int, steps: int | None) -> int:
    """Forwards within which every block has lost its masks."""
    return math.ceil(block_size / min_commit) if steps is None else steps


def decode_problem(keys: DecodeKeys, block_size: int | None) -> str | None:
    """The first rule between keys that they break. Without a block size, the rules that need one are left out."""
    steps, ascending = keys.steps, keys.step_schedule == "ascending"
    if steps is not None and keys.min_commit > 1:
        return (
            f"decode.min_commit {keys.min_commit} with decode.steps {steps}: both say how much a forward commits at "
            "least; leave out one"
        )
    if ascending and steps is None:
        return (
            "decode.step_schedule ascending without decode.steps: counts can only grow towards a last step; set "
            "decode.steps, such as 6 for blocks of 32"
        )
    if block_size is None:
        return None
    if steps is not None and steps > block_size:
        return f"decode.steps {steps} > block_size {block_size}: a step commits at least one token; lower it"
    if ascending and steps in (1, block_size):
        return (
            f"decode.step_schedule ascending with decode.steps {steps} and block_size {block_size}: no step can commit "
            "more than another; use a number between 1 and the block size, or even"
        )
    if keys.eos_penalty > 0 and most_steps(block_size, keys.min_commit, steps) == 1:
        return (
            f"decode.eos_penalty {keys.eos_penalty:g} where a block of {block_size} takes one forward: its first is its "
            "last and commits everything; set it to 0, or give the block more forwards"
        )
    return None
