"""The page of the loop, which the promoter serves."""
