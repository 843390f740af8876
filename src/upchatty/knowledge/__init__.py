"""What chatbots know: documents read, split into passages, embedded, and searched."""
