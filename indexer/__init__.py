"""Offline: fit the curvature, encode every training sequence, write an index."""
