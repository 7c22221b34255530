"""From a request to an answer: checks, scheduling, sampling, text."""
