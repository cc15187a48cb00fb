"""A trained system as a folder for PyTorch: card, certificate, and the folder itself (its files: `interop.exported`)."""
