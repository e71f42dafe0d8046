"""The verbs of `dfactory data` under the names that a checkout has for them, and what makes the bundled data.

The verbs live in dfactory/data_tools/ and are installed with it. The programs that make the quickstart's records, models and
table are part of a checkout only.
"""
