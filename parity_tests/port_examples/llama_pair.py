"""What is compared: the Llama of `transformers`, tiny and with random weights, and its port.

flaxgpt-check-port llama_pair.py:make_pair
"""

import jax.numpy as jnp
import llama
import numpy as np
import optax
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flaxgpt.port.linen_recorder import LinenRecorder
from flaxgpt.port.pair import Pair
from torch_ref.port.torch_recorder import TorchRecorder

NAMES = {
    "model.embed_tokens": "embed",
    "model.layers.{}": "block{}",
    "model.layers.{}.input_layernorm": "block{}.norm1",
    "model.layers.{}.self_attn": "block{}.attention",
    "model.layers.{}.self_attn.q_proj": "block{}.attention.query",
    "model.layers.{}.self_attn.k_proj": "block{}.attention.key",
    "model.layers.{}.self_attn.v_proj": "block{}.attention.value",
    "model.layers.{}.self_attn.o_proj": "block{}.attention.out",
    "model.layers.{}.post_attention_layernorm": "block{}.norm2",
    "model.layers.{}.mlp.gate_proj": "block{}.mlp.gate",
    "model.layers.{}.mlp.up_proj": "block{}.mlp.up",
    "model.layers.{}.mlp.down_proj": "block{}.mlp.down",
    "model.norm": "norm",
    "lm_head": "head",
}
SIZES = {"V": 97, "D": 32, "F": 40, "N": 4, "K": 2, "layers": 2, "B": 3, "T": 12}


def make_pair(module=llama, names=NAMES, seed=0, **sizes):
    """The two models and a batch with padding; `module` is the port, or one like it with a mistake."""
    s = SIZES | sizes
    config = LlamaConfig(
        vocab_size=s["V"],
        hidden_size=s["D"],
        intermediate_size=s["F"],
        num_attention_heads=s["N"],
        num_key_value_heads=s["K"],
        num_hidden_layers=s["layers"],
        rms_norm_eps=1e-5,
        attention_bias=True,
        attn_implementation="eager",
        initializer_range=s["D"] ** -0.5,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases: ones and zeros hide mistakes
                parameter.add_(0.3 * torch.randn_like(parameter))
    draw = np.random.default_rng(seed)
    lengths = draw.integers(s["T"] // 2, s["T"], s["B"])
    batch = {
        "input_ids": draw.integers(0, s["V"], (s["B"], s["T"])),
        "attention_mask": (np.arange(s["T"]) < np.append(lengths[1:], s["T"])[:, None]).astype(int),
    }
    port = module.Llama(module.Config(s["V"], s["D"], s["F"], s["N"], s["K"], s["layers"]))
    reference = TorchRecorder(model, call=call, loss=torch_loss, rebuild=lambda: LlamaForCausalLM(config))
    return Pair(reference, LinenRecorder(port, loss=loss), batch, names)


def call(model, batch):
    return model(**batch, use_cache=False).logits


def torch_loss(logits, batch):
    """Nats per token, over what is no padding."""
    keep = batch["attention_mask"][:, 1:].bool()
    return torch.nn.functional.cross_entropy(logits[:, :-1][keep], batch["input_ids"][:, 1:][keep])


def loss(logits, batch):
    """The same in JAX."""
    keep = batch["attention_mask"][:, 1:]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["input_ids"][:, 1:])
    return jnp.sum(nats * keep) / jnp.sum(keep)
