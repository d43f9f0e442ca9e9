"""What is compared: GPT-2 of `transformers`, tiny and with random weights, and its port in NNX."""

import gpt2
import numpy as np
import torch
from flax import nnx
from transformers import GPT2Config, GPT2LMHeadModel

from flaxgpt.port.nnx_recorder import NNXRecorder
from flaxgpt.port.pair import Pair
from torch_ref.port.torch_recorder import TorchRecorder

NAMES = {
    "transformer.wte": "tokens",
    "transformer.wpe": "positions",
    "transformer.h.{}": "blocks.{}",
    "transformer.h.{}.ln_1": "blocks.{}.norm1",
    "transformer.h.{}.attn": "blocks.{}.attention",
    "transformer.h.{}.attn.c_attn": "blocks.{}.attention.qkv",
    "transformer.h.{}.attn.c_attn.weight": ("blocks.{}.attention.qkv.kernel", "i o -> i o"),  # its linear layers are (in, out) already
    "transformer.h.{}.attn.c_proj": "blocks.{}.attention.out",
    "transformer.h.{}.attn.c_proj.weight": ("blocks.{}.attention.out.kernel", "i o -> i o"),
    "transformer.h.{}.ln_2": "blocks.{}.norm2",
    "transformer.h.{}.mlp.c_fc": "blocks.{}.up",
    "transformer.h.{}.mlp.c_fc.weight": ("blocks.{}.up.kernel", "i o -> i o"),
    "transformer.h.{}.mlp.c_proj": "blocks.{}.down",
    "transformer.h.{}.mlp.c_proj.weight": ("blocks.{}.down.kernel", "i o -> i o"),
    "transformer.ln_f": "norm",
}
SIZES = {"V": 97, "S": 16, "D": 24, "N": 4, "layers": 2, "B": 2, "T": 12}


def make_pair(module=gpt2, names=NAMES, seed=0, **sizes):
    """The two models and a batch; `module` is the port, or one like it with a mistake."""
    s = SIZES | sizes
    config = GPT2Config(
        vocab_size=s["V"],
        n_positions=s["S"],
        n_embd=s["D"],
        n_head=s["N"],
        n_layer=s["layers"],
        attn_implementation="eager",
        initializer_range=s["D"] ** -0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases: ones and zeros hide mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
    port = module.GPT2(s["V"], s["S"], s["D"], s["N"], s["layers"], rngs=nnx.Rngs(0))
    batch = {"input_ids": np.random.default_rng(seed).integers(0, s["V"], (s["B"], s["T"]))}
    return Pair(TorchRecorder(model, call=call), NNXRecorder(port), batch, names)


def call(model, batch):
    return model(**batch, use_cache=False).logits
