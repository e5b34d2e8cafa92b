"""Every output's bytes, recorded: a rebuild that changes one of them is seen.  `record` says how to use it."""
