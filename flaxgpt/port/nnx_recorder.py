"""Recording a Flax NNX module."""
