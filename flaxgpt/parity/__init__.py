"""Comparing what two implementations compute, and reporting it."""
