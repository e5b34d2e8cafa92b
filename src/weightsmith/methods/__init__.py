"""One file per published merging method or filter."""
