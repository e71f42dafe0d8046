"""The chat template that `chat_template_path` names: a file, a name, or the model that has it.

my.jinja                  a file of Jinja
chatml                    a template of assets/templates
qwen3, llama3_training    one of trl's, where trl is installed; `_training`: with {% generation %} markers
org/name, org/name@rev    that of a model on the hub, or of a model directory
"""

import difflib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from dfactory.config.words import TEMPLATE_ENDINGS
from dfactory.errors import ConfigError
from dfactory.hub import fetch, is_hub_name

OWN = Path(__file__).parents[1] / "assets/templates"
TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"


def read_chat_template(path: str | None) -> str | None:
    """The text of the template, or None for None. Raises ConfigError for what is no template."""
    if path is None:
        return None
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    if Path(path).is_dir():
        return _of_model(path, lambda name: file if (file := Path(path) / name).is_file() else None)
    if (named := named_templates().get(path)) is not None:
        return named.read_text(encoding="utf-8")
    name, _, revision = path.partition("@")
    if is_hub_name(name) and not name.endswith(TEMPLATE_ENDINGS):
        told = f"chat_template_path {path} is no file and cannot be read"
        return _of_model(path, lambda file: fetch(name, revision or None, file, told))
    near = difflib.get_close_matches(path, named_templates(), n=3)
    hint = f" (did you mean {', '.join(near)}?)" if near else ""
    raise ConfigError(
        f"chat_template_path {path} does not exist{hint}: give a Jinja file, a name such as chatml, a model that has one "
        "(a directory, or org/name), or null for the tokenizer's own"
    )


def named_templates() -> dict[str, Path]:
    """The templates that have a name."""
    trl = importlib.util.find_spec("trl")
    folders = [Path(trl.origin).parent / "chat_templates"] if trl is not None and trl.origin else []
    return {file.stem: file for folder in (*folders, OWN) for file in sorted(folder.glob("*.jinja"))}


def _of_model(named: str, find: Callable[[str], Path | None]) -> str:
    if (file := find(TEMPLATE)) is not None:
        return file.read_text(encoding="utf-8")
    file = find(CONFIG)
    template = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file is not None else None
    if isinstance(template, list):  # several, each with a name
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    if not isinstance(template, str):
        raise ConfigError(f"chat_template_path {named}: that model has no chat template; give a Jinja file")
    return template
