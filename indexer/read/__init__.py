"""The data on their way in: files, documents, sequences, records."""
