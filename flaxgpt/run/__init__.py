"""A run on this machine: its folder, what is checked first, the terminal and the pictures."""
