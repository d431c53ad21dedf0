"""What persona axes are for: judging assistant-likeness, intervening under hostile personas, and watching drift."""
