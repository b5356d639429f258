"""One run: its folder, its checkpoints, and the words that show it."""
