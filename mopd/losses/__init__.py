"""Pure tensor maths: every loss against one vocabulary shard."""
