"""The files that a search leaves, and its page."""
