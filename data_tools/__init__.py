"""Small commands that make the bundled data and the embedded tokenizer, and that print the quickstart's table."""
