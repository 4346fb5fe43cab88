"""The subcommands of eplb-offline, one file each: its arguments, and what it does."""
