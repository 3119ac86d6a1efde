"""What an index is on disk: the reader and the writer of each of its files live together here."""
