"""The door to transformers: models and tokenizers as they are loaded, and their linear maps."""
