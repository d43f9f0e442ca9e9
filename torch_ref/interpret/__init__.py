"""The same questions to a module, by hooks."""
