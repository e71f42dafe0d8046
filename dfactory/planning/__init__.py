"""What a recipe will need and do, computed without weights and without a GPU.

memory.py   parameters and a memory forecast for a rank, from config.json
fit.py      whether that fits a GPU, and which keys would make it fit
steps.py    a dry run over the records: how full rows are, steps, epochs
start.py    work of a step, room of checkpoints
costs.py    seconds of a step on paper: operations, memory traffic, network traffic
"""
