"""Stage 2: what judges make of the replies."""
