"""Pure tensor mathematics: no module, no file, no thread."""
