"""Recipe keys: blocks, mask ratios, and how many views a document gets."""

from dataclasses import dataclass
from typing import Any, Optional

from dfactory.config.keys import key


@dataclass
class NoiseKeys:
    block_size: Optional[int] = key(
        32,
        "tokens that are denoised together; with a schedule, its last block size; null: the whole document, with full "
        "attention, for model families that have it",
        low=1,
    )
    eos_fill: Optional[int] = key(
        None,
        "with full attention: fill each document with EOS, which is trained where its last token is, up to a multiple of "
        "so many tokens, so that the model learns to end an answer anywhere on its canvas; null: no fill",
        low=1,
    )
    block_size_schedule: Optional[list[list[int]]] = key(
        None,
        "block sizes over the run, as [first step, block size] pairs: [[0, 1], [200, 4], [400, 32]]; the first starts at "
        "step 0, the last equals block_size; a document shorter than a block is one block; null: block_size",
    )
    noise_range_low: float = key(0.3, "smallest mask ratio t", low=0.0, high=1.0)
    noise_range_high: float = key(0.8, "largest mask ratio t", low=0.0, high=1.0)
    noise_level: str = key("block", "draw t once per document, or per block", choices=("document", "block"))
    num_views: int = key(1, "independent views of a document in one packed sequence", low=1)
    complementary: bool = key(
        True, "add to each view one that masks exactly the other response tokens: 2 x num_views views"
    )
    mask_embedding_noise: float = key(
        0.0,
        "standard deviation, per component, of Gaussian noise on mask embeddings at the first step; the embeddings of "
        "trained models have 0.02 to 0.1; 0: off",
        low=0.0,
    )
    mask_embedding_noise_steps: int = key(0, "steps in which that noise falls linearly to 0", low=0)
    neftune_noise_alpha: Optional[float] = key(
        None,
        "NEFTune: noise on the embeddings of all tokens while training, of alpha / sqrt(row_length x hidden size); 5 to 15 "
        "is usual; null: none",
        low=0.0,
    )
    stratified: bool = key(False, "draw t of the n-th of num_views views from the n-th of num_views equal slices")
    mask_count: str = key(
        "bernoulli",
        "mask each token with probability t, or draw the exact number of masks from 0 to all (in each block or document, "
        "by noise_level), which makes ELBO weights bounded",
        choices=("bernoulli", "exact"),
    )
    after_answer: str = key(
        "fill",
        "what views show after an answer in its last block, if another turn follows: EOS fill, which has to be produced "
        "as after the last answer, or the record's text, which no decoder sees",
        choices=("fill", "text"),
    )
    view_source: str = key(
        "mask",
        "noise masks at random; or views are the states of a decoder's trace (files of `generate --keep-trace`); or, for "
        "model families with uniform noise, tokens of the response become random ones, in canvases of block_size",
        choices=("mask", "trace", "uniform"),
    )
    self_conditioning: float = key(
        0.0,
        "with view_source uniform: share of views that get the model's own prediction of a first pass without gradient; "
        "above 0 every step makes that pass; 0.5: as DiffusionGemma is trained",
        low=0.0,
        high=1.0,
    )
    trace_stride: int = key(
        1,
        "with view_source or policy_loss trace: how many neighbouring decoder steps of a block (with full attention, of the "
        "canvas) are learnt as one",
        low=1,
    )
    trace_filter: str = key(
        "correct", "leave out (and count) traces with `correct: false`, or use all", choices=("correct", "all")
    )

    @property
    def mask_options(self) -> dict[str, Any]:
        """How random masks are drawn, as `noise.RandomMask` takes it."""
        return {
            "low": self.noise_range_low,
            "high": self.noise_range_high,
            "per_block": self.noise_level == "block",
            "num_views": self.num_views,
            "complementary": self.complementary,
            "stratified": self.stratified,
            "mask_count": self.mask_count,
        }

    @property
    def views_are_traces(self) -> bool:
        return self.view_source == "trace"

    @property
    def has_canvases(self) -> bool:
        """Whether noise is uniform: views are canvases over a causal clean stream."""
        return self.view_source == "uniform"

    @property
    def uniform_options(self) -> dict[str, Any]:
        """How tokens are replaced, as `noise.UniformNoise` takes it."""
        names = ("low", "high", "per_block", "num_views", "stratified")
        return {name: self.mask_options[name] for name in names} | {"self_conditioning": self.self_conditioning}
