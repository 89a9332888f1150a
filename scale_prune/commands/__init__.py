"""The commands, one a module, each with `main(argv)`: parse, call, print."""
