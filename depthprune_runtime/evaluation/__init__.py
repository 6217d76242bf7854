"""Quality: perplexity of a text."""
