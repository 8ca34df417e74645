"""Tables of names that map parameters of other code to ours."""
