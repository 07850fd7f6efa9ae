"""The `mopd` command."""
