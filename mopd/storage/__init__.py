"""Files that appear whole, and the directories of checkpoints: no torch, no rank."""
