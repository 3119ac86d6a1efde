"""From a query to its hits: codes, shortlists, exact scores, the recall statement."""
