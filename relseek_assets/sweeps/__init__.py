"""Stage 2: steered generations at every dose, and what the models make of them."""
