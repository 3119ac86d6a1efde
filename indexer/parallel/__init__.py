"""A build by many processes: over Ray, and the merge of what shards did."""
