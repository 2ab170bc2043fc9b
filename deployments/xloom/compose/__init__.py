"""`xloom compose`: a router trained over adapters that stay as they are, in plain torch."""
