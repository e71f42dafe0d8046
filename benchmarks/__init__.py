"""Programs that measure, one a table. `dfactory bench NAME` and `python -m benchmarks.NAME` are the same."""

BENCHMARKS = {
    "table": "the whole table of speed: the opponent, another checkout and this tree, row by row",
    "step": "a training step beside the opponent's: seconds, memory, loss; --profile: where its time goes",
    "packing": "records of mixed lengths in packed rows, beside the opponent's sorted and padded ones",
    "likelihood": "the ELBO of N views in one pass, beside the opponent's separate passes",
    "tree": "a prompt shared by the answers of a group, beside rows without sharing",
    "decoding": "block decoding in slots, beside the opponent's cached loop",
    "rl": "an update split into rollout, reward, sync and training, beside the opponent's",
    "overlap": "reinforcement learning with asynchronous rollouts, beside the same with synchronous ones",
    "staleness": "reinforcement learning on rollouts of older policies, with and without their correction",
    "rl_variance": "the variance of a policy gradient by kind of token: the answer, and what stands after EOS",
    "loading": "reading a checkpoint, beside reading its bytes",
    "data": "the reader, a start and the tools on large files of records",
    "growth": "how a step's cost grows with length, views, batch, experts and ranks",
    "scale": "a model, not a measurement, of LLaDA2 mini and flash on 8 to 512 GPUs",
    "gpu_check": "everything that only a GPU can show, in one go",
    "dpo_variance": "how far shared noise and pairs cut the variance of a preference margin",
    "patterns": "attention patterns: which learns what of the quickstart's tasks in the same CPU time",
    "ar": "the autoregressive yardstick: the same weights fine-tuned, scored and decoded by transformers",
    "conversion": "what a conversion of an autoregressive model buys, by block size, shift, LoRA, rate and length",
    "cpt": "an autoregressive model turned into a block-diffusion one, beside training from scratch",
}
