"""A training run before it is started: what the compiled step holds, computes and sends, on machines that need not be there."""
