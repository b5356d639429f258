"""The first hour: from rows to a recipe, and a look at it before it runs."""
