"""Many recipes and seeds as real runs, and their results side by side."""
