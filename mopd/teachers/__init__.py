"""Teachers score the student's answers, each with its own template and tokenizer."""
