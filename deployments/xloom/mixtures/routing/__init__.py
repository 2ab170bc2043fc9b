"""Where the gates of a mixture's tokens come from: one kind a file, found by name in `registry`."""
