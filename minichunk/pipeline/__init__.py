"""A model over several processes: each has a block of its layers, and chunks pass through the blocks."""
