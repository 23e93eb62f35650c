"""The pool of engines: who writes which sample, and how finished groups stream out."""
