"""Prompts to their continuations: token ids, and text, whole or streamed."""
