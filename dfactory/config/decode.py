"""Keys of the decoder: `decode.threshold=0.9` on the command line, `decode:` in a recipe."""

from dataclasses import dataclass
from typing import Optional

from dfactory.config.keys import key


@dataclass
class DecodeKeys:
    block_size: Optional[int] = key(
        None, "tokens denoised together; null: as the model was trained, else 32; in a recipe, its block_size", low=1
    )
    max_new_tokens: int = key(512, "longest response, EOS included", low=1)
    threshold: float = key(0.95, "commit a masked position when its confidence exceeds this", low=0.0, high=1.0)
    min_commit: int = key(1, "commit at least so many a forward, the most confident first", low=1)
    editing_threshold: Optional[float] = key(
        None,
        "replace a visible response token when another exceeds this; null: off; 0.0: at any other argmax",
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
    batch_size: int = key(32, "slots decoded together; a finished response frees its slot", low=1)
    seed: int = key(0, "of the sampling, per prompt", low=0)
    mask_token_id: Optional[int] = key(None, "null: ask the tokenizer")
    eos_token_id: Optional[int] = key(None, "null: ask the tokenizer")
