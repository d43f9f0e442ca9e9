"""Checking anybody's port: two models recorded, compared and, where they part, diagnosed."""
