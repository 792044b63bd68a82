"""One training step to look at: what happens in it as a log of events, and a page that shows it."""
