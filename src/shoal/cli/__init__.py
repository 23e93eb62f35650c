"""The `shoal` command: one module for each subcommand."""
