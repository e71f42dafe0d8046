"""The verbs of `dfactory data`: small commands over record files. See data_tools/README.md."""
