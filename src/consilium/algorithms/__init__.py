"""One file, one paper: the server half and the client half of a method."""
