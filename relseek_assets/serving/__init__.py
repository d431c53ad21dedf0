"""Stage 3: what is deployed of a study's vectors."""
