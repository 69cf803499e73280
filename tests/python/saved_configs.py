"""Writes `saved.json` into each folder of tests/fixtures/families: its `config.json` as transformers 5.17 saves it again, with all that
it makes of it. It is the same model.

    python tests/python/saved_configs.py
"""

import json

import families
from transformers import AutoConfig


def main():
    """All of them."""
    families.settle()
    for folder in sorted(path.parent for path in families.FIXTURES.glob("*/config.json")):
        saved = json.loads(AutoConfig.from_pretrained(folder).to_json_string(use_diff=False))
        del saved["_name_or_path"]
        # Of the parts that see or hear, nothing is read.
        saved = {key: {} if key in ("vision_config", "audio_config") else value for key, value in saved.items()}
        (folder / "saved.json").write_text(json.dumps(saved, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
