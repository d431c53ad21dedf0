"""Stage 1: from starter conversations to preference pairs and their split."""
