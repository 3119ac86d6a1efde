"""How fast this machine does the work of a build, measured on a few sequences."""
