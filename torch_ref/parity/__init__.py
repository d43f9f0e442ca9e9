"""What the reference computes, recorded for comparison."""
