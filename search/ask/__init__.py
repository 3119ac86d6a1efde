"""What is asked: a query, how to search for it, files of queries."""
