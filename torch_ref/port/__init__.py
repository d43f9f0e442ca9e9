"""The torch half of `flaxgpt.port`: recording any nn.Module."""
