"""Where a model is: a file or folder of this machine, or a model of the Hugging Face hub, downloaded once. Imports no framework."""

from __future__ import annotations

import os
from pathlib import Path

from flaxgpt.convert.files import CONFIG, INDEX
from flaxgpt.errors import InputError

SHORT = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
"""Short name -> id on the hub."""

_FILES = [CONFIG, "model.safetensors", "model-*.safetensors", INDEX, "tokenizer.json", "vocab.json", "merges.txt"]
"""What is downloaded of a model. No pickles."""


def find_model(path_or_id: Path | str) -> Path:
    """The file or the folder that a model is in.

    Args:
        path_or_id: a file or folder; or, if there is none of this name, an id on the hub or its short name. A model of the hub is kept in
            the hub's cache (HF_HOME, HF_HUB_CACHE), and with HF_HUB_OFFLINE=1 only looked for there.

    Raises:
        InputError: nothing is found under this name.
    """
    path = Path(path_or_id)
    if os.path.lexists(path) and path.exists():  # False where a name is too long to be one
        return path
    name = SHORT.get(str(path_or_id), str(path_or_id))
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ModuleNotFoundError:
        raise InputError(
            f"there is no file or folder {path}, and to look for {name} on the hub needs huggingface_hub: "
            'pip install -e ".[hf]" (or "flaxgpt[hf]")'
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except errors.HFValidationError:
        reason = "and it is no id of a model on the hub"
    except errors.RepositoryNotFoundError:  # also of one that needs a login
        reason = f"and the hub has no model {name}, or none that you may read"
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"
        reason = f"and {name} is not in the hub's cache, and {why}"
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        reason = f"and {name} can't be had from the hub ({error})"
    raise InputError(f"there is no file or folder {path}, {reason}")
