"""The curvature of a model, fitted block by block, by one process or many."""
