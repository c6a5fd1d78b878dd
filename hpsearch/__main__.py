"""`python -m hpsearch` is the `hpsearch` command."""

from hpsearch.cli.main import main

main()
