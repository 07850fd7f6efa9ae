"""Token bytes, fingerprints and chat templates: what a tokenizer means, in bytes."""
