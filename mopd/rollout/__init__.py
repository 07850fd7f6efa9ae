"""The student's own answers: samplers, the journal they are written to, and weight sync."""
