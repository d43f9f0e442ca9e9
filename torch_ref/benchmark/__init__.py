"""What flaxgpt is timed against."""
