"""The command `minichunk` and its options."""
