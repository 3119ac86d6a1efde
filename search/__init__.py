"""Online: shortlist by code, rescore exactly, say how complete the answer is."""
