"""The tiny Kandinsky 2.2 and the emoji that ship with the package."""
