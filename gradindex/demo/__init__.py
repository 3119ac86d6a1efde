"""The demo: a small language model of the Python standard library, made where it is needed."""
