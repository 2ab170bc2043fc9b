"""The commands of `xloom`, one a file."""
