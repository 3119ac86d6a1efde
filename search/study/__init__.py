"""What is learned from many searches: how good an index is, what is in it."""
