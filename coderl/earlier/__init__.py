"""Modules under their names from before the packages, for configs that runs saved and for users' modules."""
