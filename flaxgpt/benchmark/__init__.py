"""Timing ourselves beside others: calls in alternating rounds, lower bounds, the table and the picture of both."""
