"""The data sets of the paper, one file each: how a publisher lays one out, and how it is scored."""
