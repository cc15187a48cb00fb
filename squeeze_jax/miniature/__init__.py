"""The miniature: drawn critters, their words and tokenizer, the training of its encoders, its
scores."""
