"""A history to look at: a report in one file, and a page that follows it.

Nothing here writes to a history. Both are made of the same parts and drawings.
"""
