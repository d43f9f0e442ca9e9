"""GPT-2 as a stateful PyTorch program: the reference that `flaxgpt` is compared with."""
