"""Files in and out: checkpoints, adapters, documents, chats. Whole or absent, and nothing is unpickled."""
