"""Common byte boundaries of two tokenizations, and the payload on the student's axis."""
