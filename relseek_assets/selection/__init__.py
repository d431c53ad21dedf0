"""Stage 2: which vector to use, and how its doses move the judges."""
