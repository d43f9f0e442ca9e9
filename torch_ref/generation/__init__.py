"""Prompts to their continuations, by a module."""
