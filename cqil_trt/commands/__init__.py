"""The commands: they parse and print, the library does the work."""
