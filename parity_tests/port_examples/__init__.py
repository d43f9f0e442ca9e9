"""Ports that the general door (`flaxgpt.port`) is shown at."""
