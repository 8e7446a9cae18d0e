"""`make bench`: compares speeds in one run on one machine. Ratios are comparable; absolute figures depend on the machine."""
