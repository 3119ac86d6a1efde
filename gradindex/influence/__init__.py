"""The mathematics: gradients of sequences, their curvature, codes and exact influence."""
