"""For ports: every intermediate of both algorithms."""
