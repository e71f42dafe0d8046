"""Small commands over records: the verbs of `dfactory data`, and what makes the bundled data. See README.md."""
