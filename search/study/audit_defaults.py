"""What an audit takes where it is told nothing else: read by the audit and by flags.

Nothing heavy is imported here, so that the command line can show its flags at once.
"""

MOST_EXACT = 20_000  # sequences that are scored exactly, where the index has more
SHOWN = 20  # sequences on a terminal and in a notebook
LISTED = 100  # sequences on a page
EXCERPT = 400  # letters of a text there
