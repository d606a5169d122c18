"""How fast, against what: `make bench`."""
