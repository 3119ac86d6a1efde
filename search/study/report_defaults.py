"""What a report takes where it is told nothing else: read by the survey and by flags.

Nothing heavy is imported here, so that the command line can show its flags at once.
"""

OWN_QUERIES = 16  # of the index's own sequences
SCORED_SEQUENCES = 4096  # exactly, where the index has more
