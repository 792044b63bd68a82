"""What chunks leave behind for later chunks, and get back from them."""
