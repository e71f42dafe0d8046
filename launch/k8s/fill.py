"""`python fill.py rayjob.yaml RECIPE [key=value ...]`: the manifest with recipe and overrides, to standard output."""

import shlex
import sys
from pathlib import Path
from typing import Any

import yaml


def fill(manifest: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Add the arguments of `dfactory train` to the entrypoint of a RayJob, or of each pod of a PyTorchJob."""
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        spec["entrypoint"] = f"{spec['entrypoint']} {shlex.join(words)}"
    else:
        for replica in spec["pytorchReplicaSpecs"].values():
            replica["template"]["spec"]["containers"][0]["args"] = list(words)
    return manifest


class Plain(yaml.SafeDumper):
    """Without anchors: every value is written out."""

    def ignore_aliases(self, data) -> bool:
        return True


if __name__ == "__main__":
    file, *given = sys.argv[1:]
    print(yaml.dump(fill(yaml.safe_load(Path(file).read_text()), given), Dumper=Plain, sort_keys=False), end="")
