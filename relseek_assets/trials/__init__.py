"""Stage 8: estimates from the tables of randomised trials."""
