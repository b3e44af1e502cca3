"""The data sets of the paper, one module each: its layout as published, and how it is scored."""
