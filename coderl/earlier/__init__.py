"""Modules under the names they had in coderl 0.1, for configs that its runs saved and for users' modules."""
