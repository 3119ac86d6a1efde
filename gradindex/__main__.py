"""`python -m gradindex` is `gradindex`."""

from gradindex.cli import main

main()
