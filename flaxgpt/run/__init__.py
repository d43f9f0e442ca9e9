"""A run on this machine: what is checked first, its folder, its log, the terminal, the picture and the command line."""
