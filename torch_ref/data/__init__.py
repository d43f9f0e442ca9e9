"""Windows to the batches of an epoch, in an order drawn from the global generator."""
