"""Text to tokens to windows to the batch of a step."""
