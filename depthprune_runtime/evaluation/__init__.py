"""Quality: perplexity of a text, and zero-shot tasks."""
