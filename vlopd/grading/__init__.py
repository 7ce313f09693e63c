"""Rule-based grading: extraction of answers from generated text, and their equality with the reference answer."""
