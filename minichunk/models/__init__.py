"""Models: layers with a memory, their configs in Hugging Face's terms, adapters beside them."""
