"""Models with the embedded one's tokenizer and other attention, small and untrained."""

import json
import shutil
from pathlib import Path

from dfactory.models.registry import read_tokenizer
from dfactory.models.tiny import TINY_DIR, embedded_config
from tests.batches import TINY_SIZES

TOKENIZER = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


def write_model(folder: Path, model_type: str, **keys) -> list[str]:
    """Write config.json and tokenizer of an untrained model. Returns the recipe keys that name it."""
    folder.mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copy(TINY_DIR / name, folder)
    tokenizer = read_tokenizer(TINY_DIR)
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = TINY_SIZES | {"vocab_size": embedded_config()["vocab_size"], "initializer_range": 0.1}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **sizes, **ids, **keys}))
    return [f"model_name_or_path={folder}", "init_weights=random"]
