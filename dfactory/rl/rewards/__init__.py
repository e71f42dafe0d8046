"""Reward functions, with TRL's signature: a function trained with there runs here, and the other way round.

    def reward(prompts, completions, **columns) -> list[float | None]

`prompts` and `completions` have one entry a rollout: strings, or lists of messages when the prompt was a conversation.
The columns of the dataset row come as lists of the same length, and with them `completion_ids`, `tokens_per_forward`,
`forwards` and `finish_reason` of each rollout, and the functions `log_metric(name, value)` and `log_extra(column, values)`.
None says "not mine to score", 0 says "wrong". The function may be `async`.

A function gets what it names, and with **columns everything. Before a run starts, `function.check_row(row)`, where there is
one, raises ValueError for a row of the data that it will not be able to score, and `function.prepare(**options)` refuses
options that cannot work on this machine.

To add one: a file here that adds its function to REWARDS (base.py), or such a file in a package of one's own with an entry
point in the group `dfactory.rewards`. Its options are keyword-only parameters with a default. Prove it with correct, wrong,
malformed, hanging and cheating answers. No file here imports torch: reward processes are small.
"""
