"""What fine-tuning a part of a network buys: full fine-tuning, families, masks, and what a search finds."""
