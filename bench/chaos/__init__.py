"""The crash matrix: kill everything everywhere, and let the provider's bill judge."""
