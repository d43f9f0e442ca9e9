"""nanoGPT's model, written again in as few lines as show its arithmetic, and its checkpoints."""

import pickle
from pathlib import Path

import torch
from torch.nn import functional as F

ARGS = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": 37, "dropout": 0.0}
CHARS = "".join(sorted("\n abcdefghijklmnopqrstuvwxyzäé你🙂,.;!?"))
COMPILED = "_orig_mod."


def logits(weights, args, ids):
    """What nanoGPT's GPT computes of ids (B, T), by its own names and layouts: `F.layer_norm`, `F.linear`, exact `F.gelu`, a tied head."""

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (args["n_embd"],), weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5)

    (B, T), N, D = ids.shape, args["n_head"], args["n_embd"]
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:T]
    for i in range(args["n_layer"]):
        block = f"transformer.h.{i}"
        parts = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(D, dim=2)
        q, k, v = (part.view(B, T, N, D // N).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).reshape(B, T, D), f"{block}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    return F.linear(norm(x, "transformer.ln_f"), weights["lm_head.weight"])


def random_weights(bias: bool, args=ARGS) -> dict[str, torch.Tensor]:
    """By nanoGPT's names, with nothing at its default."""
    torch.manual_seed(0)
    D = args["n_embd"]
    shapes = {"wte": (args["vocab_size"], D), "wpe": (args["block_size"], D)}
    for i in range(args["n_layer"]):
        linear = {"attn.c_attn": (3 * D, D), "attn.c_proj": (D, D), "mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}
        block = {"ln_1": (D,), "ln_2": (D,)} | linear
        shapes |= {f"h.{i}.{name}": shape for name, shape in block.items()}
    weights = {}
    for name, shape in (shapes | {"ln_f": (D,)}).items():
        weights[f"transformer.{name}.weight"] = ("ln_" in name) + 0.2 * torch.randn(shape)
        if bias and name not in ("wte", "wpe"):
            weights[f"transformer.{name}.bias"] = 0.2 * torch.randn(shape[0])
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def save_checkpoint(folder: Path, bias: bool, args=ARGS, prefix: str = COMPILED) -> dict[str, torch.Tensor]:
    """A ckpt.pt as nanoGPT's train.py writes it, optimizer and all, with the masks that it has without flash attention; its weights."""
    folder.mkdir()
    weights, mask = random_weights(bias, args), torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    model = {prefix + name: tensor for name, tensor in weights.items()}
    model |= {f"{prefix}transformer.h.{i}.attn.bias": mask for i in range(args["n_layer"])}
    others = {"optimizer": optimizer.state_dict(), "iter_num": 5, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x"}}
    torch.save({"model": model, "model_args": {**args, "bias": bias}, **others}, folder / "ckpt.pt")
    return weights


def save_meta(path: Path, chars: str = CHARS, **changes) -> None:
    """A meta.pkl as nanoGPT's prepare.py writes it."""
    stoi = {char: i for i, char in enumerate(chars)}
    path.write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi} | changes))
