"""Small models that `transformers` itself makes and saves."""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

NARROW = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 24}
WIDE = {"n_embd": 48, "n_head": 3, "n_layer": 2, "n_positions": 16, "tie_word_embeddings": False}


def make_model(shape, **others):
    """GPT2LMHeadModel in eval mode with nothing at its default: zeros and ones hide bugs."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, **others)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if "ln" in name or "bias" in name else 0.1 * torch.randn_like(parameter))
    return model


def save_folders(root: Path) -> None:
    """Folders as save_pretrained writes them: plain and sharded, float16 and bfloat16."""
    for name, shape, options in (("plain", NARROW, {}), ("sharded", WIDE, {"max_shard_size": "4MB"})):
        make_model(shape).save_pretrained(root / name, **options)
    make_model(WIDE).half().save_pretrained(root / "float16")
    make_model(NARROW).bfloat16().save_pretrained(root / "bfloat16")
