"""Stage 2: steering vectors."""
