"""How a result is shown: on a terminal, as a file of data, as a page."""
