"""A model that answers while it is running: over HTTP (`dfactory serve`) and in the terminal (`dfactory chat`).

body --requests--> Generation --engine--> Progress of each answer --answers--> text, block by block --app--> JSON, SSE
"""
