"""Windows as a torch Dataset, and the loader that shuffles them."""
