"""What each method buys: quality, memorization and cost of every method on small data sets, over several seeds."""
