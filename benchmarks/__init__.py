"""`make bench`: speeds side by side, in one run on one machine. Ratios count; absolute figures are of that machine."""
