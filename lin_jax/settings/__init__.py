"""What can be set, one file a section, and the command line."""
