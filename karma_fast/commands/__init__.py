"""What each subcommand of `karma-fast` does: a function from parsed arguments to an exit code."""
