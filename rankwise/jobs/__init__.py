"""What a command does, from files to files; the command line parses and prints, these do the work."""
